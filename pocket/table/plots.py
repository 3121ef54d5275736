"""The plots of the table: a panel a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...engine.compare.results import Comparison, SystemScores, pareto_front
from ...engine.compare.statistics import mean_interval, prompt_means
from .systems import REFERENCE

_BLUE, _RED, _GREY = "#30638e", "#d1495b", "#777777"
#: Systems whose way along the trajectory is drawn, with their colours.
_DRAWN = {
    "Q8_0": "#1b9e77",
    "FP8 per row": "#7570b3",
    "W8A8": _RED,
    "W8A8 + smooth": "#e6ab02",
    "W8A8 rotated": _BLUE,
    "ours: INT8 rotated, calibrated": "#e07a1f",
    "ours: INT8 auto": "#000000",
    "Q4_K": "#66a61e",
    "NF4": _GREY,
}


def _panels(count: int, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * count, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.grid(True, alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels


def fidelity(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Latent SQNR after the last step over the bytes of both copies, with the Pareto front.

    Without the rungs of the protection ladder, which have a plot of their own, and the GGUF rows as
    W8A8, which would cover others.
    """
    figure, panels = _panels(len(comparisons), 6.0)
    for axes, (name, comparison) in zip(panels, comparisons.items(), strict=True):
        points = []
        for system in comparison.systems:
            cell = comparison.cell(system, "latent_sqnr")
            left_out = system.name == REFERENCE or system.name.endswith(("protected", "as W8A8"))
            if not left_out and cell is not None:
                points.append((system.bytes / 1e6, cell.interval, system.name))
        for size, interval, _ in points:
            bars = [[interval.mean - interval.low], [interval.high - interval.mean]]
            axes.errorbar(
                size, interval.mean, yerr=bars, fmt="o", ms=4, capsize=2, color=_BLUE, zorder=5
            )
        _labels(axes, [(size, interval.mean, label) for size, interval, label in points])
        front = pareto_front([(size, interval.mean) for size, interval, _ in points])
        x, y = [points[i][0] for i in front], [points[i][1].mean for i in front]
        axes.step(x, y, where="post", color=_RED, lw=1.0, label="Pareto front", zorder=1)
        axes.set(title=name, xlabel="both copies (MB)")
        axes.set_xlim(right=max(p[0] for p in points) + 2.2)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel(f"latent SQNR to {REFERENCE} (dB)")
    figure.savefig(path)


def levels(points: Mapping[str, Sequence[tuple[str, float, float, bool]]], path: Path) -> None:
    """Latent SQNR over bits a weight: (name, bits, dB, whether it is ours) of every model."""
    figure, panels = _panels(len(points), 9.0)
    for axes, (model, found) in zip(panels, points.items(), strict=True):
        for _, bits, db, ours in found:
            axes.plot(bits, db, "o", ms=5, color=_RED if ours else _GREY, zorder=5)
        short = [(bits, db, name.removeprefix("ours: ")) for name, bits, db, _ in found]
        _labels(axes, short, reach=1.6, right=0.08)
        best = [(bits, db) for _, bits, db, ours in found if ours]
        front = [best[i] for i in pareto_front(best)]
        axes.step(*zip(*front, strict=True), where="post", color=_RED, lw=1.0, zorder=1)
        axes.set(title=model, xlabel="bits a weight", xlim=(3.8, 10.6))
    panels[0].plot([], [], "o", color=_RED, label="ours")
    panels[0].plot([], [], "o", color=_GREY, label="other programs'")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel(f"latent SQNR to {REFERENCE} (dB)")
    figure.savefig(path)


def _labels(
    axes, points: Sequence[tuple[float, float, str]], reach: float = 3.0, right: float = 0.15
) -> None:
    """Labels ``right`` of their points, pushed apart where points lie within ``reach``."""
    low, high = axes.get_ylim()
    step = (high - low) / 32
    placed: list[tuple[float, float]] = []
    for x, y, label in sorted(points, key=lambda p: p[1]):
        place = y
        for other_x, other_y in placed:
            if abs(other_x - x) < reach and place - other_y < step:
                place = other_y + step
        placed.append((x, place))
        axes.annotate(
            label, (x, y), xytext=(x + right, place), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": _GREY},
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            zorder=3,
        )  # fmt: skip


def trajectories(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Mean latent SQNR after every step: where a system leaves the reference."""
    figure, panels = _panels(len(comparisons), 4.4)
    for axes, (name, comparison) in zip(panels, comparisons.items(), strict=True):
        for system in comparison.systems:
            if system.name in _DRAWN and system.steps:
                steps = range(1, len(system.steps) + 1)
                axes.plot(steps, system.steps, lw=1.4, color=_DRAWN[system.name], label=system.name)
        axes.set(title=name, xlabel="sampling step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(f"latent SQNR to {REFERENCE} (dB)")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(_DRAWN), frameon=False)
    figure.savefig(path)


def ladders(rungs: Mapping[str, Sequence[tuple[int, SystemScores]]], path: Path) -> None:
    """Latent SQNR over the number of linears that stay in bf16."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, alpha=0.25)
    for (name, found), color in zip(rungs.items(), (_BLUE, _RED, "#1b9e77"), strict=False):
        counts, intervals = [], []
        for k, scores in found:
            means = prompt_means(scores.values["latent_sqnr"])
            counts.append(k)
            intervals.append(mean_interval([means[p] for p in sorted(means)]))
        mean = [i.mean for i in intervals]
        bars = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
        axes.errorbar(counts, mean, yerr=bars, marker="o", ms=4, capsize=3, color=color, label=name)
    axes.set_xlabel("linears of each copy kept in bf16, of 24, the most fragile first")
    axes.set_ylabel(f"latent SQNR to {REFERENCE} (dB)")
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
