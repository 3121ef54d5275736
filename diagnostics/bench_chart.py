"""The chart of ``bench``: one panel an op and token count, a bar a candidate, fastest on top."""

from __future__ import annotations

import io

from .bench_cases import title

_COLOURS = {"int8": "#2a7f62", "bf16": "#30638e", "fp32": "#8d99ae"}
# Inches that a bar, the text around a panel, the legend, and a line of the title take.
_BAR, _PANEL, _LEGEND, _LINE = 0.27, 0.75, 0.5, 0.2


def draw(document: dict) -> bytes:
    """A PNG of what ``bench.bench`` returned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups: dict[str, list[dict]] = {}
    for row in document["rows"]:
        groups.setdefault(title(row, document), []).append(row)
    bars = [len(rows) for rows in groups.values()]
    health = document["health"]
    device, torch = (health["about"][name] for name in ("device", "torch"))
    lines = [f"{device}, torch {torch}", *(f"warning: {text}" for text in health["warnings"])]
    height = _BAR * sum(bars) + _PANEL * len(bars) + _LEGEND + _LINE * len(lines)
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(bars), 1, height_ratios=bars, squeeze=False)[:, 0]
    for axes, (heading, rows) in zip(panels, groups.items(), strict=True):
        _panel(axes, heading, sorted(rows, key=lambda row: -row["ms"]))
    figure.suptitle("\n".join(lines), fontsize=9)
    used = [p for p in _COLOURS if any(row["precision"] == p for row in document["rows"])]
    handles = [Patch(color=_COLOURS[p], label=f"{p} arithmetic") for p in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _panel(axes, title: str, rows: list[dict]) -> None:
    bars = axes.barh(
        [row["name"] for row in rows],
        [row["ms"] for row in rows],
        color=[_COLOURS[row["precision"]] for row in rows],
        height=0.7,
    )
    labels = [f"{_digits(row['ms'])} ms, {row['of_ceiling']:.0%}" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("milliseconds; percent of the measured ceiling of that arithmetic", fontsize=7)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.22)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
