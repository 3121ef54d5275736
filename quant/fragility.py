"""Where a model is fragile: a ranking of its linears, and a heat map of layers x steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.new_file import check_output, replaced
from .calibration import Calibration
from .errors import CalibrationError
from .layer_stats import LayerStats
from .tables import human_db, off_by, text_table
from .treatments import Treatment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT = "int8"
_KINDS = ("qkv", "o", "w1", "w3", "w2", "adaln_modulation", "stem")  # panels, left to right
_STEM = "stem"
_DPI = 120


def check_candidate(calibration: Calibration, candidate: str) -> None:
    """CalibrationError, naming those that were measured, for one that was not."""
    if candidate not in calibration.candidates:
        raise CalibrationError(
            "the calibration has not measured this candidate",
            file=calibration.path,
            found=repr(candidate),
            needed="one of " + ", ".join(calibration.candidates),
        )


def fragility_table(
    calibration: Calibration, candidate: str = DEFAULT, count: int = 20, *, short: bool = False
) -> str:
    """The ``count`` linears that ``candidate`` hurts most, with what hurts each of them least.

    SQNR of the linear's output in dB over all steps, its worst step, the largest peak-to-median
    ratio of a token, and the kurtosis of the input. short: of those the first alone, and by how
    much the output is off.
    """
    check_candidate(calibration, candidate)
    ranking = calibration.ranking(candidate)
    if short:
        shown = [(key, off_by(calibration.layers[key].sqnr_db(candidate))) for key, _ in ranking]
        table = text_table(("linear", "output"), shown[:count], left=2)
        return f"{_title(min(count, len(ranking)), ranking, candidate)}:\n\n{table}"
    rows = []
    for key, _ in ranking[:count]:
        stats = calibration.layers[key]
        best = best_int8(stats)
        worst = worst_step(stats, candidate)
        rows.append(
            (
                key,
                "-" if best is None else best,
                human_db(stats.sqnr_db(candidate)),
                "-" if best is None else human_db(stats.sqnr_db(best)),
                f"{worst + 1}/{len(calibration.times)}",
                f"{stats.largest_peak:.3g}",
                f"{stats.kurtosis:.3g}",
            )
        )
    head = ("linear", "best int8", f"{candidate} dB", "best dB", "worst step", "peak", "kurtosis")
    title = _title(len(rows), ranking, candidate)
    return f"{title}:\n\n{text_table(head, rows, left=2)}"


def _title(count: int, ranking: Sequence, candidate: str) -> str:
    return f"most fragile {count} of {len(ranking)} linears, by the output error of {candidate}"


def best_int8(stats: LayerStats) -> str | None:
    """The INT8 treatment with the least output error; None if none was measured."""
    measured = [name for name in stats.noise if Treatment.parse(name) is not None]
    return min(measured, key=stats.error, default=None)


def worst_step(stats: LayerStats, candidate: str) -> int:
    """Index of the step at which the output error is largest."""
    return int(stats.errors[candidate].nan_to_num(nan=-1.0).argmax())


def to_json(calibration: Calibration, candidate: str = DEFAULT) -> list[dict[str, object]]:
    """The whole ranking, JSON-ready."""
    check_candidate(calibration, candidate)
    found = []
    for key, error in calibration.ranking(candidate):
        stats = calibration.layers[key]
        steps = [None if math.isnan(e) else e for e in stats.errors[candidate].tolist()]
        kurtosis = stats.kurtosis
        found.append(
            {
                "linear": key,
                "error": error,
                "error_at_steps": steps,
                "errors": {name: stats.error(name) for name in stats.noise},
                "largest_peak_to_median": stats.largest_peak,
                "kurtosis": None if math.isnan(kurtosis) else kurtosis,
                "tokens": stats.tokens,
            }
        )
    return found


def heat_map(
    calibration: Calibration,
    path: str | os.PathLike[str],
    candidate: str = DEFAULT,
    *,
    overwrite: bool = False,
) -> None:
    """Write a PNG: a row a copy, a panel a kind of linear, layers down, steps across.

    The colour is the output's SQNR in dB if that linear alone were quantized. Raises
    CalibrationError for a candidate that was not measured, WriteError and OutputExistsError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_candidate(calibration, candidate)
    target = check_output(path, overwrite=overwrite)
    panels = _panels(calibration, candidate)
    kinds = [kind for kind in _KINDS if any(kind == found for _, found in panels)]
    finite = torch.cat([db.flatten() for _, db in panels.values()])
    finite = finite[finite.isfinite()]
    scale = {"vmin": finite.min().item(), "vmax": finite.max().item()} if len(finite) else {}
    tallest = max(len(names) for names, _ in panels.values())
    height = 1.1 + len(calibration.copies) * max(1.6, 0.16 * tallest + 0.5)
    figure = Figure(figsize=(1.9 * len(kinds) + 1.6, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(calibration.copies), len(kinds), squeeze=False)
    image = None
    for row, copy in zip(axes, calibration.copies, strict=True):
        for place, kind in zip(row, kinds, strict=True):
            if (copy, kind) not in panels:
                place.set_axis_off()
                continue
            names, db = panels[copy, kind]
            steps, rows = db.shape[1], len(names)
            extent = (0.5, steps + 0.5, rows - 0.5, -0.5)  # steps count from 1, layers from 0
            image = place.imshow(db.numpy(), aspect="auto", cmap="viridis", extent=extent, **scale)
            _label(place, names, kind)
        row[0].set_ylabel(copy)
    figure.supxlabel("denoising step", fontsize=9)
    figure.suptitle(f"output SQNR of each linear, alone as {candidate}", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, label="dB (lower: more fragile)", shrink=0.9)
    with replaced(target) as part:
        figure.savefig(part, format="png")


def _panels(
    calibration: Calibration, candidate: str
) -> dict[tuple[str, str], tuple[list[str], Tensor]]:
    """(copy, kind) -> (row labels, SQNR in dB [rows, steps])."""
    grouped: dict[tuple[str, str], list[tuple[str, Tensor]]] = {}
    for key, stats in calibration.layers.items():
        if candidate not in stats.noise:
            continue
        copy, _, module = key.partition(".")
        parts = module.split(".")
        in_block = parts[0] == "layers"
        kind = parts[-1] if in_block else _STEM
        label = parts[1] if in_block else module.removesuffix(".linear")
        grouped.setdefault((copy, kind), []).append((label, -20 * stats.errors[candidate].log10()))
    return {
        group: ([label for label, _ in found], torch.stack([db for _, db in found]))
        for group, found in grouped.items()
    }


def _label(place: Axes, names: Sequence[str], kind: str) -> None:
    place.set_title(kind, fontsize=8)
    every = max(1, len(names) // 12) if kind != _STEM else 1
    shown = range(0, len(names), every)
    place.set_yticks(list(shown), [names[i] for i in shown], fontsize=6)
    place.tick_params(axis="x", labelsize=6)
    place.xaxis.get_major_locator().set_params(integer=True)
