"""Levels side by side, from pictures: batches of a graph, or folders that were rendered before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import OpError

if TYPE_CHECKING:
    from ..engine.compare.results import Comparison


def compare_levels(
    batches: Sequence[Tensor],
    names: Sequence[str],
    folders: Mapping[str, Path],
    captions: Sequence[str] = (),
    *,
    differences: bool = False,
) -> tuple[Tensor, str]:
    """(contact sheet, words and table): the first level is the reference of the others.

    ``batches`` are IMAGE [B, H, W, 3] in [0, 1], one a level, the same prompts and seeds in the
    same order; or ``folders`` name -> folder, the same file names in all. ``captions``: one for all
    pictures or one a picture, for the text metrics. The sheet is [1, H, W, 3]; with ``differences``
    [2, ...], the second one of difference maps. What cannot be measured is a line below the table.
    """
    from ..engine.compare.score import rendered_folders, score, word_reader
    from ..engine.compare.sheet import comparison_sheet
    from ..engine.compare.tables import markdown

    if bool(batches) == bool(folders):
        raise OpError(
            "nothing to compare" if not batches else "pictures and folders at once",
            needed="either pictures connected, or folders named; two levels at least",
        )
    if len(batches or folders) < 2:
        raise OpError(
            "one level alone",
            needed="two at least: the first is the reference",
            hint="Connect the pictures of another level, or name its folder.",
        )
    notes: list[str] = []
    if batches:
        systems, cases = _from_batches(batches, names, captions)
    else:
        first = next(iter(folders))
        systems, cases, notes = rendered_folders(folders, first, _captions_of(folders[first]))
    reference = systems[0].scores.name
    comparison = score(reference, systems, cases, reader=word_reader(cases, notes))
    comparison.gaps += notes
    by_name = {system.scores.name: system for system in systems}

    def picture(name: str, case) -> Image.Image | None:
        return by_name[name].picture(case)

    sheets = [comparison_sheet(comparison, picture)]
    if differences:
        sheets.append(comparison_sheet(comparison, picture, differences=True))
    told = "\n\n".join([*_strays(comparison), markdown(comparison)])
    return torch.cat([_to_image(sheet) for sheet in sheets]), told


def _strays(comparison: Comparison) -> list[str]:
    """How far each level is from the first, in words: the root mean square of the difference."""
    from ..engine.compare.metrics import PSNR_CAP

    lines = []
    for system in comparison.systems:
        cell = comparison.cell(system, "psnr")
        if system.name == comparison.reference or cell is None:
            continue
        decibels = cell.interval.mean
        if decibels >= PSNR_CAP:
            lines.append(f"{system.name}: the same pixels as {comparison.reference}.")
            continue
        part = 100 * 10 ** (-decibels / 20)
        lines.append(
            f"{system.name} strays from {comparison.reference} by {part:.2g} % of full brightness "
            f"(PSNR {decibels:.1f} dB)."
        )
    return lines


def _from_batches(batches: Sequence[Tensor], names: Sequence[str], captions: Sequence[str]):
    from ..engine.compare.cases import Case
    from ..engine.compare.metrics import text_asked
    from ..engine.compare.results import SystemScores
    from ..engine.compare.score import Rendered

    labels = _labels(names, len(batches))
    count = len(batches[0])
    if len(captions) not in (0, 1, count):
        raise OpError(
            "the captions do not fit the pictures",
            found=f"{len(captions)} captions",
            needed=f"none, one for all, or {count}",
        )
    prompts = list(captions) * count if len(captions) == 1 else list(captions)
    cases = []
    for i in range(count):
        prompt = prompts[i] if prompts else None
        height, width = batches[0].shape[1:3]
        text = None if prompt is None else text_asked(prompt)
        # The number keeps pictures apart; those of one caption are its seeds.
        name = f"picture {i + 1}" if prompt is None else prompt
        seed = 0 if prompt is None else prompts[:i].count(prompt)
        cases.append(Case(name, seed, width, height, text=text))
    places = {case.key: i for i, case in enumerate(cases)}

    def rendered(label: str, batch: Tensor) -> Rendered:
        def picture(case: Case) -> Image.Image | None:
            i = places[case.key]
            return _to_picture(batch[i]) if i < len(batch) else None

        return Rendered(SystemScores(label, "", 0), picture)

    return [rendered(label, b) for label, b in zip(labels, batches, strict=True)], cases


def _labels(names: Sequence[str], count: int) -> list[str]:
    given = [name.strip() for name in names if name.strip()]
    if len(given) > count:
        raise OpError("more names than levels", found=", ".join(given), needed=f"{count} at most")
    labels = [*given, *(f"level {i + 1}" for i in range(len(given), count))]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise OpError("two levels share a name", found=repeated[0])
    return labels


def read_folders(text: str, root: Path) -> dict[str, Path]:
    """``name = folder`` a line -> folders below ``root``; OpError for one outside it."""
    root = root.resolve()
    folders: dict[str, Path] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, separator, value = (part.strip() for part in line.partition("="))
        if not (name and separator and value):
            raise OpError("not of the form: name = folder", found=line)
        if name in folders:
            raise OpError("two levels share a name", found=name)
        folder = (root / value).resolve()
        if not folder.is_relative_to(root):
            raise OpError("a folder outside ComfyUI's output folder", found=value)
        folders[name] = folder
    return folders


def read_captions(text: str) -> list[str]:
    """One JSON caption over any number of lines, or a caption a line; plain text is a caption."""
    if not text.strip():
        return []
    try:
        json.loads(text)
        return [text.strip()]
    except (ValueError, RecursionError):
        return [line.strip() for line in text.splitlines() if line.strip()]


def _captions_of(folder: Path) -> dict[str, str]:
    """``captions.json`` in the reference's folder, if it is there: file name -> caption."""
    file = folder / "captions.json"
    if not file.is_file():
        return {}
    from ..engine.compare.score import read_captions_file

    return read_captions_file(file)


def _to_picture(image: Tensor) -> Image.Image:
    pixels = (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


def _to_image(picture: Image.Image) -> Tensor:
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
