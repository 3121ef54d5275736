"""The comparison as Markdown and CSV."""

from __future__ import annotations

import csv
import io

from .metrics import METRICS
from .results import Cell, Comparison, SystemScores, totals


def markdown(comparison: Comparison) -> str:
    """One row a system: level, size, and each metric as mean with its 95 % interval.

    A mark behind a text or score metric gives the paired verdict against the reference:
    ``=`` indistinguishable, ``+`` better, ``-`` worse.
    """
    metrics = comparison.metrics()
    head = ["system", "level", "MB", *(METRICS[m].label for m in metrics)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for system in comparison.systems:
        name = (
            f"**{system.name}** (reference)" if _is_reference(comparison, system) else system.name
        )
        cells = [cell_text(comparison.cell(system, m), METRICS[m].digits) for m in metrics]
        lines.append("| " + " | ".join([name, system.level, _megabytes(system), *cells]) + " |")
    count = totals(comparison)
    lines.append("")
    lines.append(
        f"{count['prompts']} prompts, {count['seeds']} seeds each; 95 % bootstrap intervals over "
        "prompts, paired by prompt and seed. `=`: indistinguishable from the reference (the "
        "interval of the paired difference spans zero), `+` better, `-` worse."
    )
    lines.extend(f"- gap: {gap}" for gap in comparison.gaps)
    return "\n".join(lines) + "\n"


_MARKS = {"indistinguishable": " =", "better": " +", "worse": " -", None: ""}


def cell_text(cell: Cell | None, digits: int) -> str:
    """``mean [low, high] mark``; a gap is ``n/a``."""
    if cell is None:
        return "n/a"
    interval = cell.interval
    text = f"{interval.mean:.{digits}f}"
    if interval.low != float("-inf") and interval.low != interval.high:
        text += f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return text + _MARKS[cell.verdict]


def comma_separated(comparison: Comparison) -> str:
    """CSV: a row a system and metric, with the interval and the paired difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["system", "level", "bytes", "metric", "mean", "low", "high", "prompts",
         "difference", "difference_low", "difference_high", "verdict"]
    )  # fmt: skip
    for system in comparison.systems:
        for metric in comparison.metrics():
            cell = _csv_cell(comparison.cell(system, metric))
            writer.writerow([system.name, system.level, system.bytes, metric, *cell])
    return out.getvalue()


def _csv_cell(cell: Cell | None) -> list[object]:
    if cell is None:
        return [""] * 8
    difference = cell.difference
    bounds = (
        ["", "", ""] if difference is None else [difference.mean, difference.low, difference.high]
    )
    interval = cell.interval
    return [interval.mean, interval.low, interval.high, interval.n, *bounds, cell.verdict or ""]


def _is_reference(comparison: Comparison, system: SystemScores) -> bool:
    return system.name == comparison.reference


def _megabytes(system: SystemScores) -> str:
    return f"{system.bytes / 1e6:.1f}" if system.bytes else ""
