"""Scores of every system on every case, and what they say together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...files.new_file import replaced
from .cases import Case
from .metrics import METRICS
from .statistics import Interval, mean_interval, paired_difference, prompt_means

Values = dict[tuple[str, int], float]


@dataclass
class SystemScores:
    """One system's numbers: ``values[metric][(prompt, seed)]``; a missing key is a marked gap.

    ``bytes`` counts both copies' files; ``steps`` holds the mean latent SQNR after each step (dB).
    """

    name: str
    level: str
    bytes: int
    values: dict[str, Values] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def set(self, metric: str, key: tuple[str, int], value: float) -> None:
        """Record one score."""
        self.values.setdefault(metric, {})[key] = value


@dataclass(frozen=True)
class Cell:
    """One metric of one system: its interval, and that of its paired difference to the reference.

    ``verdict`` is ``better``, ``worse`` or ``indistinguishable`` (the interval spans zero), and
    ``None`` where there is nothing to compare with.
    """

    interval: Interval
    difference: Interval | None
    verdict: str | None


@dataclass
class Comparison:
    """All systems on all cases; ``gaps`` says why a metric or a picture is missing."""

    reference: str
    cases: list[Case]
    systems: list[SystemScores]
    gaps: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)

    def system(self, name: str) -> SystemScores:
        """The scores of the system called ``name``."""
        return next(s for s in self.systems if s.name == name)

    def metrics(self) -> list[str]:
        """Names of the metrics that any system has, in the order of the table of metrics."""
        present = {name for system in self.systems for name, v in system.values.items() if v}
        return [name for name in METRICS if name in present]

    def cell(self, system: SystemScores, metric: str, *, against: str | None = None) -> Cell | None:
        """The cell of the table; ``None`` is a gap. ``against`` names another system to pair with.

        Metrics that measure the distance to the reference have no difference to it.
        """
        values = system.values.get(metric)
        if not values:
            return None
        means = prompt_means(values)
        interval = mean_interval([means[p] for p in sorted(means)])
        other = self.system(against or self.reference)
        if other.name == system.name or not other.values.get(metric):
            return Cell(interval, None, None)
        difference = paired_difference(values, other.values[metric])
        return Cell(interval, difference, verdict(difference, METRICS[metric].better))


def verdict(difference: Interval | None, better: str) -> str | None:
    """``better``, ``worse``, or ``indistinguishable`` where the interval spans zero.

    ``None`` without pairs, and for fewer prompts than an interval needs: they decide nothing.
    """
    if difference is None or not difference.known:
        return None
    if difference.spans_zero:
        return "indistinguishable"
    return "better" if (difference.mean > 0) == (better == "higher") else "worse"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, value) that no other beats in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    best = float("-inf")
    for i in order:
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def to_json(comparison: Comparison) -> dict:
    """Plain data: everything the tables and the report show, and every single score."""
    return {
        "reference": comparison.reference,
        "settings": comparison.settings,
        "gaps": comparison.gaps,
        "cases": [
            {"id": c.prompt_id, "prompt": c.prompt, "seed": c.seed, "text": c.text,
             "width": c.width, "height": c.height}
            for c in comparison.cases
        ],
        "systems": [_system_json(comparison, system) for system in comparison.systems],
    }  # fmt: skip


def _system_json(comparison: Comparison, system: SystemScores) -> dict:
    cells = {name: comparison.cell(system, name) for name in comparison.metrics()}
    return {
        "name": system.name,
        "level": system.level,
        "bytes": system.bytes,
        "seconds": system.seconds,
        "notes": system.notes,
        "latent_sqnr_steps": system.steps,
        "metrics": {name: _cell_json(cell) for name, cell in cells.items()},
        "scores": {
            name: [{"id": key[0], "seed": key[1], "value": v} for key, v in sorted(values.items())]
            for name, values in system.values.items()
        },
    }


def _cell_json(cell: Cell | None) -> dict | None:
    if cell is None:
        return None
    return {
        "mean": cell.interval.mean,
        "interval": _bounds(cell.interval),
        "prompts": cell.interval.n,
        "difference": None if cell.difference is None else cell.difference.mean,
        "difference_interval": None if cell.difference is None else _bounds(cell.difference),
        "verdict": cell.verdict,
    }


def _bounds(interval: Interval) -> list[float] | None:
    """JSON has no infinity: an interval of too few prompts is ``null``."""
    if interval.low == float("-inf"):
        return None
    return [interval.low, interval.high]


def write_json(comparison: Comparison, path: Path) -> None:
    """``results.json``: strict JSON, keys in a fixed order."""
    text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
    with replaced(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def extent(comparison: Comparison) -> str:
    """How much was compared: ``64 prompts, 2 seeds each`` (the most seeds of one prompt), and how
    many pictures every system made at once, where they were made here."""
    counts = Counter(case.prompt_id for case in comparison.cases)
    seeds = max(counts.values(), default=0)
    prompts = f"{len(counts)} prompt{'' if len(counts) == 1 else 's'}"
    together = comparison.settings.get("pictures_at_once")
    batch = "" if together is None else f", every system {together} picture at a time"
    return f"{prompts}, {seeds} seed{'' if seeds == 1 else 's'} each{batch}"
