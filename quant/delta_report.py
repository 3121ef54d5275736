"""What a low-rank difference leaves: a table of ranks with the error of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .tables import human_bytes, text_table

_SHOWN = 5


@dataclass(frozen=True)
class LinearDelta:
    """One linear [N, K]: mean squares of its output, summed over channels.

    width: N + K; stem: whether it lies outside the blocks, and has all its energies at every rank
    but 0; signal: of the unconditional copy's output; total: of the difference's; energies:
    what each rank takes of it, the first one first; written: what is left with the halves as they
    were stored.
    """

    module: str
    width: int
    stem: bool
    signal: float
    total: float
    energies: tuple[float, ...]
    written: float

    def error(self, rank: int) -> float:
        """``|(D - up down) x| / |W x|`` at a rank; 0 leaves the conditional copy's own weight."""
        taken = math.fsum(self.energies[: self.rank_at(rank)])
        return _relative(max(self.total - taken, 0.0), self.signal)

    def rank_at(self, rank: int) -> int:
        """Its own rank where that of the blocks' linears is ``rank``."""
        return len(self.energies) if self.stem and rank else min(rank, len(self.energies))

    @property
    def written_error(self) -> float:
        """The same of what was written, rounding included."""
        return _relative(self.written, self.signal)


@dataclass(frozen=True)
class DeltaReport:
    """The file that was written, its linears, and the vectors that it cannot hold.

    weighted: errors are of the linears' outputs at the inputs of a calibration; else of weights.
    """

    path: Path
    size: int
    rank: int
    weighted: bool
    levels: tuple[str, str]
    linears: tuple[LinearDelta, ...]
    vectors: tuple[tuple[str, float], ...]

    def mean_error(self, rank: int) -> float:
        """Root mean square over the linears of their relative errors at a rank."""
        return _rms([linear.error(rank) for linear in self.linears])

    def bytes_at(self, rank: int) -> float:
        """Of the tensors at another rank, in the dtype of the file."""
        counts = [
            sum(linear.width * linear.rank_at(r) for linear in self.linears)
            for r in (rank, self.rank)
        ]
        return self.size * counts[0] / counts[1]

    def ranks(self) -> tuple[int, ...]:
        """0, the powers of two, and the rank that was written."""
        return (0, *(2**i for i in range(13) if 2**i < self.rank), self.rank)

    def table(self) -> str:
        """A row for each rank, then what was written and what no rank can hold."""
        rows = []
        for rank in self.ranks():
            worst = max(self.linears, key=lambda linear, rank=rank: linear.error(rank))
            mean = self.mean_error(rank)
            size = human_bytes(self.bytes_at(rank)) if rank else "-"
            rows.append(
                [
                    str(rank),
                    size,
                    f"{mean:.1%}",
                    _db(mean),
                    f"{worst.error(rank):.1%}",
                    worst.module,
                ]
            )
        kind = "outputs" if self.weighted else "weights"
        head = ["rank", "file", f"error of {kind}", "SQNR dB", "worst linear", ""]
        mean = _rms([linear.written_error for linear in self.linears])
        lines = [
            text_table(head, rows, left=0),
            f"{self.path}: rank {self.rank}, {human_bytes(self.size)}, {len(self.linears)} "
            f"linears; as stored the {kind} are off by {mean:.1%} ({_db(mean)} dB) in the mean",
        ]
        if not self.weighted:
            lines.append("--calibration weighs the difference by the inputs that there are")
        lines += self._vectors()
        rounded = [level for level in self.levels if level != "BF16"]
        if rounded:
            lines.append(
                f"made of {' and '.join(dict.fromkeys(rounded))} files: part of the difference is "
                "their rounding; BF16 files give a better one"
            )
        return "\n\n".join(lines)

    def _vectors(self) -> list[str]:
        off = sorted((v for v in self.vectors if v[1] > 0), key=lambda vector: -vector[1])
        if not off:
            return []
        shown = ", ".join(f"{name} {error:.0%}" for name, error in off[:_SHOWN])
        return [
            f"{len(off)} norms, biases and embeddings differ too, which no LoRA holds; they stay "
            f"the conditional copy's: {shown}{', ...' if len(off) > _SHOWN else ''}"
        ]


def _relative(left: float, signal: float) -> float:
    if signal > 0:
        return math.sqrt(max(left, 0.0) / signal)
    return math.inf if left > 0 else 0.0


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else 0.0


def _db(error: float) -> str:
    return "exact" if error == 0 else f"{-20 * math.log10(error):.1f}"
