"""The plots of ``bench_chooser.py``, from the files that it writes."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#777777", "#2f855a"
PACK = {"native": (BLUE, "chosen, safetensors"), "gguf": (ORANGE, "chosen, GGUF")}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, for values without ties."""

    def ranks(values: list[float]) -> list[int]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(i) for i in range(len(values))]

    n = len(first)
    off = sum((a - b) ** 2 for a, b in zip(ranks(first), ranks(second), strict=True))
    return 1 - 6 * off / (n * (n * n - 1))


def behind(rows: list[dict[str, str]]) -> list[str]:
    """Mixes that are farther than a single level of their model and container and no more bits."""
    single = [row for row in rows if "bits" not in row["chosen"]]
    return [
        f"{mix['model']}, {mix['chosen']}: {mix['dB']} dB, {level['chosen']} has {level['dB']}"
        for mix in rows
        if "bits" in mix["chosen"]
        for level in single
        if all(level[key] == mix[key] for key in ("model", "container"))
        and float(level["bits"]) <= float(mix["bits"])
        and float(level["dB"]) > float(mix["dB"])
    ]


def draw(pareto: Path, by_chance: Path, levels: Path, folder: Path) -> None:
    """Write both plots into ``folder``; ``levels``: the committed table, for the peers."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    peers = [row for row in read(levels) if not row["level"].startswith("ours")]
    if rows := read(pareto):
        _pareto(rows, peers, folder / "chooser-pareto.png")
    if rows := read(by_chance):
        _foretold(rows, read(pareto), folder / "chooser-foretold.png")


def _models(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _pareto(rows: list[dict[str, str]], peers: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    models = _models(rows)
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 6.4), sharex=True, sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for container, (colour, label) in PACK.items():
            there = [r for r in own if r["container"] == container]
            budgets = [r for r in there if r["chosen"].endswith("bits")]
            _curve(panel, budgets, colour, label, "-")
            built_in = [r for r in there if "built-in" in r["chosen"]]
            if built_in:
                _curve(panel, built_in, colour, f"{label}, by the built-in gains", ":")
            single = [r for r in there if "bits" not in r["chosen"]]
            _points(panel, single, ("chosen", "dB"), colour, "s", None)
        some = [r for r in peers if r["model"] == model]
        _points(panel, some, ("level", "sqnr"), GREY, "x", "others, 64 or 32 captions")
        panel.set_title(model)
        panel.set_xlim(3.8, 9.8)  # names stand right of their points
        panel.set_xlabel("bits a weight of the linears in the blocks")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("latent SQNR (dB)")
    panels[0][0].legend(frameon=False, loc="upper left", fontsize=7)
    panels[0][0].set_ylim(8, 64)  # sharey: of all panels
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _curve(panel, rows: list[dict[str, str]], colour: str, label: str, line: str) -> None:
    """Mixes by size, with their intervals."""
    rows = sorted(rows, key=lambda row: float(row["bits"]))
    x, y, low, high = ([float(r[key]) for r in rows] for key in ("bits", "dB", "low", "high"))
    bars = [
        [b - a for a, b in zip(low, y, strict=True)],
        [b - a for a, b in zip(y, high, strict=True)],
    ]
    panel.errorbar(x, y, bars, marker="o", ms=4, lw=1.6, ls=line, color=colour, label=label)


def _points(panel, rows, keys: tuple[str, str], colour: str, mark: str, label: str | None) -> None:
    """Single systems, each with its name, which moves down where another one stands."""
    name, measured = keys
    taken = getattr(panel, "names_at", [])
    for at, row in enumerate(sorted(rows, key=lambda row: -float(row[measured]))):
        x, y = float(row["bits"]), float(row[measured])
        panel.plot(x, y, mark, ms=5, color=colour, label=label if at == 0 else None, alpha=0.85)
        place = y
        while any(abs(place - v) < _LINE and abs(x - u) < _WIDE for u, v in taken):
            place -= _LINE / 4
        taken.append((x, place))
        panel.annotate(
            row[name], (x, y), xytext=(x + 0.08, place), fontsize=5.5, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": colour, "shrinkB": 2},
        )  # fmt: skip
    panel.names_at = taken


_LINE, _WIDE = 1.1, 1.7  # dB and bits that a name takes


def spread(rows: list[dict[str, str]]) -> tuple[float, float, float]:
    """(rank correlation, mean of foretold minus measured dB, its standard deviation)."""
    foretold, found = ([float(row[key]) for row in rows] for key in ("foretold", "dB"))
    off = [a - b for a, b in zip(foretold, found, strict=True)]
    return rank_correlation(foretold, found), statistics.mean(off), statistics.stdev(off)


def _foretold(by_chance: list[dict[str, str]], chosen: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5.6, 5.2))
    for model, colour in zip(_models(by_chance), (BLUE, ORANGE, GREEN), strict=False):
        for rows, mark, of in ((by_chance, "o", "by chance"), (chosen, "+", "")):
            found = [r for r in rows if r["model"] == model and "built-in" not in r["chosen"]]
            x, y = ([float(r[key]) for r in found] for key in ("foretold", "dB"))
            label = None
            if of:
                label = f"{model}, {of}: rank correlation {rank_correlation(x, y):.3f}"
            panel.plot(x, y, mark, ms=4.5, color=colour, label=label, alpha=0.85)
    panel.plot([], [], "+", color=GREY, label="chosen for a size, and single levels")
    ends = [float(r[k]) for r in (*by_chance, *chosen) for k in ("foretold", "dB")]
    panel.plot([min(ends), max(ends)], [min(ends), max(ends)], lw=0.8, color="#bbbbbb")
    panel.set_xlabel("foretold (dB)")
    panel.set_ylabel("measured latent SQNR (dB)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=7.5, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
