"""From figures to the document: its tables are made here, its prose is written by hand."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.compare.statistics import Interval, mean_interval
from ...engine.compare.tables import markdown_row
from ...files.new_file import replaced
from ..table.report import fill
from .settings import BOTH_WAYS, LOWER, ON_16_GB, SAME_BYTES, WHOLE, Pair, Setting

#: Columns of the table of causes: name among `Errors.figures`, heading, unit.
CAUSES = (
    ("own SQNR, conditional", "SQNR of its velocity, conditional"),
    ("own SQNR, unconditional", "unconditional"),
    ("own error", "conditional error against the other's, own scale"),
    ("entering", "as it enters the latents"),
    ("text exact", "of the conditional error is left: text exact"),
    ("image exact", "image exact"),
    ("without text", "run without text"),
    ("cosine", "cosine of both errors"),
)


@dataclass(frozen=True)
class Row:
    """One pair on one model at one setting: dB of each caption, in their order, and bytes."""

    model: str
    setting: Setting
    pair: Pair
    nbytes: int
    decibels: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return mean_interval(self.decibels)


class Rows:
    """All rows, to be asked by model, setting and pair."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_place = {(row.model, row.setting, row.pair): row for row in rows}

    def __iter__(self):
        return iter(self._by_place.values())

    def find(self, model: str, setting: Setting, pair: Pair) -> Row | None:
        """The row, if it was measured."""
        return self._by_place.get((model, setting, pair))

    def places(self) -> list[tuple[str, Setting]]:
        """(model, setting) of all that was measured, in order."""
        return list(dict.fromkeys((row.model, row.setting) for row in self))


def shown(of: Interval) -> str:
    """A mean with half of its 95 % interval."""
    return f"{of.mean:.1f} ± {(of.high - of.low) / 2:.1f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(markdown_row(line) for line in (head, marks, *lines))


def lower_table(rows: Rows, model: str) -> str:
    """One conditional level beside ever lower unconditional ones, and two equal copies beside."""
    lines = []
    for pair in LOWER:
        row = rows.find(model, WHOLE, pair)
        equal = rows.find(model, WHOLE, (pair[1], pair[1]))
        if row is not None:
            twice = "" if equal is None else shown(equal.interval)
            lines.append((pair[1], f"{row.nbytes / 1e6:.1f}", shown(row.interval), twice))
    return _table(("unconditional copy", "MB", "beside INT8", "both copies at it"), lines)


def same_bytes_table(rows: Rows) -> str:
    """Pairs of the same bytes, a column a model and setting."""
    places = rows.places()
    lines = []
    for group in (*SAME_BYTES, BOTH_WAYS, (ON_16_GB,)):
        for pair in group:
            found = [rows.find(model, setting, pair) for model, setting in places]
            if any(found):
                size = next(f"{row.nbytes / 1e6:.1f}" for row in found if row)
                cells = ["" if row is None else shown(row.interval) for row in found]
                lines.append((" + ".join(pair), size, *cells))
    head = [f"{model}, {setting.name}" for model, setting in places]
    return _table(("conditional + unconditional", "MB", *head), lines)


def cause_table(causes: dict[tuple[str, Setting], dict[str, list[float]]], rows: Rows) -> str:
    """What each cause makes of the difference, a column a model and setting."""
    head = [f"{model}, {setting.name}" for model, setting in causes]
    lines = [("guidance alone, a / b", *(f"{weigh(s):.1f}" for _, s in causes))]
    for name, heading in CAUSES:
        lines.append((heading, *(_cause(found[name], name) for found in causes.values())))
    lines.append(("in the final latents", *(_final(rows, *place) for place in causes)))
    return _table(("dB", *head), lines)


def weigh(setting: Setting) -> float:
    """dB by which guidance weighs the conditional copy's error more, both at their own scale."""
    a, b = setting.true_factors
    return 20 * math.log10(a / b)


def _cause(values: Sequence[float], name: str) -> str:
    of = mean_interval(values)
    digits = 3 if name == "cosine" else 1
    return f"{of.mean:.{digits}f} ± {(of.high - of.low) / 2:.{digits}f}"


def _final(rows: Rows, model: str, setting: Setting) -> str:
    """By how much a lower conditional copy costs more than a lower unconditional one."""
    better, worse = (rows.find(model, setting, pair) for pair in BOTH_WAYS)
    if better is None or worse is None:
        return ""
    pairs = zip(better.decibels, worse.decibels, strict=True)
    return shown(mean_interval([one - other for one, other in pairs]))


def gain_table(gains: dict[str, dict[str, list[float]]], every: int) -> str:
    """Energy of the final error over that of one step's, a column a step."""
    count = len(next(iter(next(iter(gains.values())).values())))
    head = [str(1 + every * i) for i in range(count)]
    lines = [
        (f"{setting}: {source}", *(f"{value:.1f}" for value in along))
        for setting, sources in gains.items()
        for source, along in sources.items()
    ]
    return _table(("dB, error put in at step", *head), lines)


def as_csv(rows: Rows) -> str:
    """All rows with intervals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ("model", "setting", "conditional", "unconditional", "bytes", "dB", "low", "high", "n")
    )
    for row in rows:
        of = row.interval
        figures = (f"{x:.2f}" for x in (of.mean, of.low, of.high))
        writer.writerow((row.model, row.setting.name, *row.pair, row.nbytes, *figures, of.n))
    return out.getvalue()


def write_document(document: Path, parts: dict[str, str], figures: str) -> None:
    """Fills the document's tables and writes the CSV beside it."""
    filled = fill(document.read_text(encoding="utf-8"), parts)
    for path, text in ((document, filled), (document.with_suffix(".csv"), figures)):
        with replaced(path) as part:
            part.write_text(text, encoding="utf-8")
