"""The plots of ``bench_chooser.py``, from the files that it writes."""

from __future__ import annotations

import csv
from pathlib import Path

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#777777", "#2f855a"
_SIDE = "peers, side runs (12 captions or unknown)"
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


def draw(pareto: Path, by_chance: Path, peers: Path, folder: Path) -> None:
    """Write both plots into ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    _pareto(read(pareto), read(peers), folder / "chooser-pareto.png")
    _foretold(read(pareto), read(by_chance), folder / "chooser-foretold.png")


def _pareto(rows: list[dict[str, str]], peers: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 6.4), sharex=True, sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for container, (colour, label) in PACK.items():
            budgets = [
                r for r in own
                if r["container"] == container and r["chosen"].endswith("bits")
            ]  # fmt: skip
            budgets.sort(key=lambda r: float(r["bits"]))
            x, y = ([float(r[key]) for r in budgets] for key in ("bits", "dB"))
            bars = [
                [float(r["dB"]) - float(r["low"]) for r in budgets],
                [float(r["high"]) - float(r["dB"]) for r in budgets],
            ]
            panel.errorbar(x, y, bars, marker="o", ms=4, lw=1.6, color=colour, label=label)
            single = [r for r in own if r["container"] == container and "bits" not in r["chosen"]]
            _points(panel, single, "chosen", colour, "s", None)
        there = [r for r in peers if r["model"] == model]
        for mark, of_table, label in (("x", True, "peers, 64 captions"), ("+", False, _SIDE)):
            some = [r for r in there if r["source"].startswith("pocket-table") == of_table]
            _points(panel, some, "system", GREY, mark, label)
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


def _points(panel, rows, name: str, colour: str, mark: str, label: str | None) -> None:
    """Single systems, each with its name, which moves down where another one stands."""
    taken = getattr(panel, "names_at", [])
    for at, row in enumerate(sorted(rows, key=lambda row: -float(row["dB"]))):
        x, y = float(row["bits"]), float(row["dB"])
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


def _foretold(rows: list[dict[str, str]], by_chance: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5.6, 5.2))
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = [("by chance, clean", by_chance, GREY)]
    for model, colour in zip(models, (BLUE, ORANGE, GREEN), strict=False):
        chosen = [r for r in rows if r["model"] == model and "built-in" not in r["chosen"]]
        groups.append((f"chosen and single levels, {model}", chosen, colour))
    for label, found, colour in groups:
        x, y = ([float(r[key]) for r in found] for key in ("foretold", "dB"))
        if len(x) > 2:
            label = f"{label}: rank correlation {rank_correlation(x, y):.3f}"
        panel.plot(x, y, "o", ms=4, color=colour, label=label, alpha=0.85)
    ends = [float(r[key]) for _, found, _ in groups for r in found for key in ("foretold", "dB")]
    panel.plot([min(ends), max(ends)], [min(ends), max(ends)], lw=0.8, color="#bbbbbb")
    panel.set_xlabel("foretold (dB)")
    panel.set_ylabel("measured latent SQNR (dB)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=7.5, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
