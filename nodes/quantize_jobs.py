"""What a run of Quantize Ideogram 4 writes: which files, at a level or for a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import comfy.model_management as management
import comfy.utils

from ..checkpoint.copies import COPIES
from ..checkpoint.listing import Listing, new_name
from ..files.new_file import check_output
from ..files.partial import partial_path
from ..quant.errors import QuantOptionError
from ..quant.output_names import named_after, output_name, suffix_of
from ..quant.presets import AS_PICKED
from ..quant.quantize import quantize_checkpoint
from ..quant.recipes import QuantOptions, Recipe
from ..quant.several import check_several
from ..quant.target import Request, quantize_to_target
from ..quant.target_files import Part
from ..quant.target_goal import Target, target_gb
from .headers import open_header

NONE = "none"
AS_IN_FILE = "as in the file"
BOTH = "both"


def size_of(gigabytes: float, preset: str) -> Target | None:
    """The size that the node's input asks for; None for 0."""
    if not gigabytes:
        return None
    if preset != AS_PICKED:
        raise QuantOptionError(
            "a size chooses by itself, and a preset is a choice already",
            found=f"target_gb {gigabytes:g}, preset {preset!r}",
            needed="one of the two",
            hint=f"Set target_gb to 0, or preset to {AS_PICKED!r}.",
        )
    return target_gb(gigabytes, "target_gb")


def at_level(
    level: str, parts: Sequence[Part], options: QuantOptions, choice: Mapping[str, object]
) -> list[str]:
    """Write every part at ``level``: their reports. Of two, one that a cancelled run has finished
    stays."""
    finished: set[Path] = set()
    cancelled = choice["resume"] and any(partial_path(Path(p.out)).exists() for p in parts)
    if not choice["overwrite"] and not cancelled:
        for part in parts:
            check_output(part.out)
    if len(parts) > 1:
        again = {"resume": cancelled, "progress": _Bars()}
        finished = check_several(parts, level, options, choice["base"], **again)
    reports = []
    for part in parts:
        if Path(part.out) in finished:
            reports.append(f"{part.out}: finished before, and kept")
            continue
        report = quantize_checkpoint(
            part.source,
            level,
            part.out,
            copy=part.copy,
            options=options,
            progress=_progress(),
            keep_partial=True,
            **choice,
        )
        reports.append(report.table())
    return reports


def at_size(
    size: Target, parts: Sequence[Part], options: QuantOptions, choice: Mapping[str, object]
) -> list[str]:
    """Choose for all parts together and write them: the choice, and their reports."""
    native = Path(parts[0].out).suffix != ".gguf"
    request = Request(tuple(parts), size, options=replace(options, native=native), **choice)
    chosen, reports = quantize_to_target(request, _Bars())
    return [chosen.table(), *(report.table() for report in reports)]


def parts_of(
    listing: Listing,
    source: str,
    recipe: Recipe,
    size: Target | None,
    copy: str,
    filename: str,
    pair: str,
) -> list[Part]:
    """The files that a run makes: one, or one for each copy."""
    path = listing.path(source)
    if pair != NONE and copy == BOTH:
        raise QuantOptionError(
            "copy says that the file holds both copies, and pair names the file of the other one",
            needed="one of the two",
            hint=f"Set pair to {NONE!r}, or copy to {AS_IN_FILE!r}.",
        )
    if copy == BOTH:
        taken: list[tuple[Path, str | None]] = [(path, each) for each in COPIES]
    else:
        taken = [(path, None if copy == AS_IN_FILE else copy)]
    if pair != NONE:
        other = dict(zip(COPIES, reversed(COPIES), strict=True)).get(copy)
        taken.append((listing.path(pair), other))
    parts, suffix, own = [], suffix_of(recipe), filename.strip()
    for file, which in taken:
        said = which if copy == BOTH else None
        if own and (said is not None or file != path):
            name = f"{own}-{which or open_header(file).copies[0]}"
        elif own:
            name = own
        elif size is not None:
            name = named_after(file, size.name, suffix, said)
        else:
            name = output_name(file, recipe, said)
        parts.append(Part(file, Path(listing.folder) / new_name(name, suffix), which))
    return parts


class _Bars:
    """A callback that draws a bar for each thing that is done."""

    def __init__(self) -> None:
        self._bars: dict[str, Callable[[int, int], None]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = _progress()
        self._bars[what](done, total)


def _progress() -> Callable[[int, int], None]:
    """A callback that draws the host's bar and ends when the user says so."""
    bar: comfy.utils.ProgressBar | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return progress
