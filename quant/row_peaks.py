"""Whether int8 weights were divided in bf16: told by the largest code of their rows.

``round(w / (absmax / 127))`` in float32 makes the largest weight of every row code 127. In bf16 the
quotient has eight bits, and where the scale was rounded up it falls to 126: so in some rows of 100
(seen with comfy-kitchen 0.2.40 and optimum-quanto 0.2.7 on bf16 weights). float16 has bits enough;
codes that error feedback chose end lower too, at 125 and below, and are not taken for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.codecs import Int8
from ..checkpoint.entries import Entry
from ..ops.chunks import row_chunks

_LINEARS = 4  # read, of each copy: the smallest have thousands of rows
_FULL = 127
#: What is lost against float32, measured on gaussian rows of 4,608: plain and rotated.
GAIN_DB = (0.5, 0.7)


@dataclass(frozen=True)
class RowPeaks:
    """Of ``rows`` rows of the ``linears`` looked at, ``low`` end at code 126, all others at 127."""

    linears: tuple[str, ...]
    rows: int
    low: int

    def __str__(self) -> str:
        less, more = GAIN_DB
        return (
            f"yes: {self.low} of {self.rows} rows of {', '.join(self.linears)} end at code 126. "
            f"Quantizing the BF16 or FP8 original anew, in float32, gains about {less} dB of the "
            f"weights, {more} dB of rotated ones"
        )


def divided_in_bf16(checkpoint: Checkpoint) -> RowPeaks | None:
    """The rows that show it, of the smallest int8 linears; None where none do.

    Reads at most four linears of each copy. A file of this pack that says it was rounded with
    error feedback is not looked at: its codes are chosen, its scales those of float32.
    """
    if '"rounding"' in str(checkpoint.metadata.get("quantization", "")):
        return None
    found = [_peaks(entry) for copy in checkpoint.copies for entry in _sample(checkpoint, copy)]
    peaks = torch.cat([peaks for _, peaks in found]) if found else torch.zeros(0)
    peaks = peaks[peaks > 0]  # a row of zeros has no peak
    low = int((peaks == _FULL - 1).sum())
    if not low or bool((peaks < _FULL - 1).any()) or 2 * low > len(peaks):
        return None
    return RowPeaks(tuple(dict.fromkeys(name for name, _ in found)), len(peaks), low)


def _sample(checkpoint: Checkpoint, copy: str) -> list[Entry]:
    entries: Mapping[str, Entry] = checkpoint.entries[copy]
    ours = [e for e in entries.values() if e.linear and set(e.codecs) == {Int8}]
    return sorted(ours, key=lambda entry: entry.nbytes)[:_LINEARS]


def _peaks(entry: Entry) -> tuple[str, Tensor]:
    """(name, the largest magnitude of every row's codes)."""
    name = entry.name.removesuffix(".weight")
    return name, torch.cat([_row_peaks(parts.weight.read()) for parts in entry.pieces])


def _row_peaks(codes: Tensor) -> Tensor:
    # int16: the magnitude of -128 is no int8
    return torch.cat([codes[rows].short().abs().amax(1) for rows in row_chunks(tuple(codes.shape))])
