"""Plain text tables and figures for the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two blanks apart: the first ``left`` ones flush left, the rest flush right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        fitted = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(fitted).rstrip())
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """``9.58 GB``: powers of 1000, as download pages and file names count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def gigabytes(count: float) -> str:
    """``0.10 GB``: as ``human_bytes``, in GB from 100 MB up, to be compared with memory."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else human_bytes(count)


def human_db(value: float) -> str:
    """``41.23``, or ``exact`` where nothing was lost."""
    return "exact" if value == math.inf else f"{value:.2f}"


def off_by(db: float) -> str:
    """An SQNR as the part by which values are off, root mean square: ``off by 10 % (20.00 dB)``."""
    if db == math.inf:
        return "exact"
    return f"off by {100 * 10 ** (-db / 20):.2g} % ({human_db(db)} dB)"


# from that many dB of SQNR on, the error has that share of the signal's power or less
_NEARNESS = ((40.0, "very near"), (30.0, "near"), (20.0, "differences show side by side"))
_FAR = "the loss shows"


def in_words(db: float) -> str:
    """A word for the SQNR of a picture's latents: the pack's own scale, the same everywhere."""
    return next((word for least, word in _NEARNESS if db >= least), _FAR)
