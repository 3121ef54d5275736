"""The comparison as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from .metrics import METRICS
from .results import Cell, Comparison, SystemScores, extent
from .statistics import METHOD, UNCORRECTED


def markdown(comparison: Comparison) -> str:
    """:func:`table`, what its marks mean, and the gaps."""
    legend = (
        f"{extent(comparison)}; 95 % intervals over prompts ({METHOD}), paired by prompt and seed. "
        "`=`: indistinguishable from the reference (the interval of the paired difference spans "
        f"zero), `+` better, `-` worse. {UNCORRECTED}"
    )
    return "\n".join([table(comparison), "", legend, *gap_lines(comparison)]) + "\n"


def table(comparison: Comparison) -> str:
    """One row a system: level, size, and each metric as mean with its 95 % interval.

    A mark behind a text or score metric gives the paired verdict against the reference:
    ``=`` indistinguishable, ``+`` better, ``-`` worse.
    """
    metrics = comparison.metrics()
    columns = [*known_columns(comparison), *(METRICS[m].label for m in metrics)]
    lines = [markdown_row(["system", *columns]), markdown_row(["---"] * (1 + len(columns)))]
    for system in comparison.systems:
        reference = system.name == comparison.reference
        name = f"**{system.name}** (reference)" if reference else system.name
        known = [COLUMNS[c](system) for c in known_columns(comparison)]
        cells = [cell_text(comparison.cell(system, m), METRICS[m].digits) for m in metrics]
        lines.append(markdown_row([name, *known, *cells]))
    return "\n".join(lines)


def gap_lines(comparison: Comparison) -> list[str]:
    """What is missing and why, a line each."""
    return [f"- gap: {gap}" for gap in comparison.gaps]


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


def megabytes(system: SystemScores) -> str:
    """Bytes of both copies in MB, empty where they are not known."""
    return f"{system.bytes / 1e6:.1f}" if system.bytes else ""


#: What is known of a system before it is measured; pictures already rendered have neither.
COLUMNS: Mapping[str, Callable[[SystemScores], str]] = {
    "level": lambda system: system.level,
    "MB": megabytes,
}


def known_columns(comparison: Comparison) -> list[str]:
    """The names of :data:`COLUMNS` that any system fills."""
    return [name for name, of in COLUMNS.items() if any(map(of, comparison.systems))]


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; bars and line breaks within a cell do not end it."""
    safe = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(safe) + " |"
