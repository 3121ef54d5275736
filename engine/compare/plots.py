"""Plots of a comparison: fidelity against memory, and where a trajectory leaves the reference."""

from __future__ import annotations

from pathlib import Path

from ...files.new_file import replaced
from .metrics import METRICS
from .results import Comparison, pareto_front


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def fidelity_against_memory(comparison: Comparison, path: Path, metric: str = "psnr") -> bool:
    """Scatter of ``metric`` over the bytes of both copies, with intervals and the Pareto front.

    Returns False, and writes nothing, where fewer than two systems have both numbers.
    """
    points = []
    for system in comparison.systems:
        cell = comparison.cell(system, metric)
        if system.name != comparison.reference and cell is not None and system.bytes:
            points.append((system.bytes / 1e6, cell.interval, system.name))
    if len(points) < 2:
        return False
    better = METRICS[metric].better
    sign = 1.0 if better == "higher" else -1.0
    figure, axes = _figure(8.0, 4.8)
    for size, interval, name in points:
        known = interval.known
        bars = [[interval.mean - interval.low], [interval.high - interval.mean]] if known else None
        axes.errorbar(size, interval.mean, yerr=bars, fmt="o", ms=5, capsize=3, color="#30638e")
        axes.annotate(
            name, (size, interval.mean), xytext=(6, 5), textcoords="offset points", fontsize=8
        )
    front = pareto_front([(size, sign * interval.mean) for size, interval, _ in points])
    axes.step(
        [points[i][0] for i in front],
        [points[i][1].mean for i in front],
        where="post",
        color="#d1495b",
        lw=1.2,
        label="Pareto front",
    )
    axes.set_xlabel("both copies on disk (MB)")
    axes.set_ylabel(f"{METRICS[metric].label} to {comparison.reference} ({better} is better)")
    axes.legend(frameon=False, fontsize=8)
    axes.margins(x=0.12)
    with replaced(path) as part:
        figure.savefig(part)
    return True


def sqnr_along_trajectory(comparison: Comparison, path: Path) -> bool:
    """Mean latent SQNR after each step: where each system leaves the reference.

    Returns False, and writes nothing, where no system has trajectories.
    """
    systems = [s for s in comparison.systems if s.steps and s.name != comparison.reference]
    if not systems:
        return False
    figure, axes = _figure(8.0, 4.8)
    for system in systems:
        axes.plot(range(1, len(system.steps) + 1), system.steps, lw=1.4, label=system.name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("sampling step")
    axes.set_ylabel(f"latent SQNR to {comparison.reference} (dB)")
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(systems) > 6 else 1)
    with replaced(path) as part:
        figure.savefig(part)
    return True
