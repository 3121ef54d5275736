"""What is claimed of the systems, by the paper or by this project, and what the table says to it.

A claim is a pair of systems and the sign of their difference, so its verdict follows from the
paired interval alone: it agrees, it does not, or it cannot be told (the interval spans zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...engine.compare.results import Comparison
from ...engine.compare.statistics import Interval
from ...engine.compare.tables import markdown_row
from .systems import REFERENCE


@dataclass(frozen=True)
class Claim:
    """``name`` minus ``other`` is positive in ``metric`` (latent SQNR in dB, or words read).

    ``text`` says it in words, ``source`` where it is from.
    """

    text: str
    source: str
    name: str
    other: str
    metric: str = "latent_sqnr"


_PAPER = "2606.12280"
_OURS = "this project"
_ROTATED = "ours: INT8 rotated, calibrated"

CLAIMS = (
    Claim("naive W8A8 loses text", _PAPER, REFERENCE, "W8A8", "ocr_exact"),
    Claim("SmoothQuant improves naive W8A8 (CLIP 14.30 to 16.56)", _PAPER, "W8A8 + smooth", "W8A8"),
    Claim(
        "protecting the 8 % most fragile linears improves it (14.30 to 16.81)",
        _PAPER, "W8A8 + protect", "W8A8",
    ),
    Claim("more than SmoothQuant does (16.81, 16.56)", _PAPER, "W8A8 + protect", "W8A8 + smooth"),
    Claim("both beat SmoothQuant alone (17.54, 16.56)", _PAPER, "W8A8 + both", "W8A8 + smooth"),
    Claim("both beat protection alone (17.54, 16.81)", _PAPER, "W8A8 + both", "W8A8 + protect"),
    Claim(
        "half of the protected linears are not enough (16.01, 17.42)",
        _PAPER, "W8A8 + protect", "W8A8, 1 protected",
    ),
    Claim("that INT8 is nearer to the reference than NF4", _PAPER, "W8A8 + both", "NF4"),
    Claim("and than Q4_K (LPIPS 0.243, 0.277, 0.306)", _PAPER, "W8A8 + both", "Q4_K"),
    Claim("FP8 is nearer than that INT8", "folklore", "FP8 per row", "W8A8 + both"),
    Claim("rotation improves naive W8A8", "ConvRot", "W8A8 rotated", "W8A8"),
    Claim("rotation replaces both", _OURS, "W8A8 rotated", "W8A8 + both"),
    Claim("the calibrated choice beats both", _OURS, "ours: INT8 auto", "W8A8 + both"),
    Claim("and rotation alone", _OURS, "ours: INT8 auto", "W8A8 rotated"),
    Claim("calibration improves rotation", _OURS, _ROTATED, "W8A8 rotated"),
    Claim("the calibrated choice improves that", _OURS, "ours: INT8 auto", _ROTATED),
    Claim("W8A8 compute costs Q8_0 fidelity", _OURS, "Q8_0", "Q8_0 as W8A8"),
    Claim("W8A8 compute costs Q4_K fidelity", _OURS, "Q4_K", "Q4_K as W8A8"),
    Claim("Q4_K is nearer than NF4", "folklore", "Q4_K", "NF4"),
    Claim("our Q4_K is nearer than ggml's", _OURS, "ours: Q4_K", "Q4_K"),
    Claim("calibration improves ours", _OURS, "ours: Q4_K, calibrated", "ours: Q4_K"),
    Claim("and lifts it above NF4", _OURS, "ours: Q4_K, calibrated", "NF4"),
    Claim("a scale a row improves FP8", "folklore", "FP8 per row", "FP8 per tensor"),
)  # fmt: skip


def verdict(difference: Interval) -> str:
    """``agrees``, ``does not``, ``cannot be told`` or ``too few prompts``."""
    if not difference.known:
        return "too few prompts"
    if difference.spans_zero:
        return "cannot be told"
    return "agrees" if difference.mean > 0 else "**does not**"


def claims_table(comparisons: Mapping[str, Comparison]) -> str:
    """A row a claim, a column a model: the paired difference, its interval, and the verdict."""
    head = ["claim", "from", *comparisons]
    lines = [markdown_row(head), markdown_row(["---"] * len(head))]
    for claim in CLAIMS:
        cells = [_cell(comparison, claim) for comparison in comparisons.values()]
        if any(cells):
            shown = [cell or "not run" for cell in cells]
            lines.append(markdown_row([claim.text, claim.source, *shown]))
    return "\n".join(lines)


def _cell(comparison: Comparison, claim: Claim) -> str:
    names = {system.name for system in comparison.systems}
    if not {claim.name, claim.other} <= names:
        return ""
    cell = comparison.cell(comparison.system(claim.name), claim.metric, against=claim.other)
    if cell is None or cell.difference is None:
        return ""
    d = cell.difference
    factor, unit = (1.0, "dB") if claim.metric == "latent_sqnr" else (100.0, "% of words")
    bounds = f"[{d.low * factor:.1f}, {d.high * factor:.1f}] " if d.known else ""
    return f"{verdict(d)}: {d.mean * factor:+.1f} {bounds}{unit}"
