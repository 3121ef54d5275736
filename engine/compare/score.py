"""Scores of pictures: the same function for pictures just rendered and for folders of pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...errors import OpError
from ..pictures import read_picture
from .cases import Case, CompareError, check_reference
from .metrics import (
    METRICS,
    PAIR_FUNCTIONS,
    latent_sqnr,
    missing_packages,
    ms_ssim_note,
    ocr_scores,
    text_asked,
)
from .results import Comparison, SystemScores
from .statistics import MIN_PROMPTS

#: A scorer that the user's own weights make possible: (reference, picture, case) -> value or None.
Scorer = Callable[[Image.Image, Image.Image, Case], "float | None"]

_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Rendered:
    """One system's pictures: a loader by case (``None`` where there is none), and trajectories.

    ``read`` holds what OCR read, by case key; ``latents`` loads ``[steps, ...]`` or ``None``.
    """

    scores: SystemScores
    picture: Callable[[Case], Image.Image | None]
    latents: Callable[[Case], object | None] = lambda case: None
    read: Mapping[tuple[str, int], str] | None = None


def word_reader(
    cases: Sequence[Case], notes: list[str] | None = None
) -> Callable[[Image.Image], str] | None:
    """OCR where a case asks for text, else ``None``; where it is not installed, a line in
    ``notes``."""
    if not any(case.text for case in cases):
        return None
    try:
        from ..ocr import WordReader

        return WordReader().read
    except ImportError as error:
        if notes is not None:
            notes.append(f"text metrics: {error}")
        return None


def score(
    reference: str,
    rendered: Sequence[Rendered],
    cases: Sequence[Case],
    *,
    reader: Callable[[Image.Image], str] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Score every system on every case against the system called ``reference``.

    Missing pictures and metrics become gaps with a reason. Raises CompareError when the reference
    has no picture at all, and OpError when two pictures of one case differ in size.
    """
    check_reference(reference, [r.scores.name for r in rendered])
    base = next(r for r in rendered if r.scores.name == reference)
    result = Comparison(reference, list(cases), [r.scores for r in rendered])
    if all(base.picture(case) is None for case in cases):
        raise CompareError(f"the reference {reference!r} has no picture of any case")
    for item in rendered:
        _score_system(result, base, item, reader, scorers or {}, progress)
    result.gaps += [
        f"{METRICS[metric].label}: needs {package} (pip install {package})"
        for metric, package in missing_packages().items()
    ]
    if "ms_ssim" in result.metrics():
        note = ms_ssim_note({(case.width, case.height) for case in cases})
        result.gaps += [] if note is None else [f"{METRICS['ms_ssim'].label}: {note}"]
    silent = sum(not case.text for case in cases)
    if silent:
        which = "no prompt asks for text"
        some = f"{silent} of {len(cases)} pictures were not asked for text"
        result.gaps.append(f"text metrics: {which if silent == len(cases) else some}")
    prompts = len({case.prompt_id for case in cases})
    if prompts < MIN_PROMPTS:
        result.gaps.append(
            f"intervals and verdicts: too few prompts ({prompts}; {MIN_PROMPTS} at least)"
        )
    return result


def _score_system(
    result: Comparison,
    base: Rendered,
    item: Rendered,
    reader: Callable[[Image.Image], str] | None,
    scorers: Mapping[str, Scorer],
    progress: Callable[[int], None] | None,
) -> None:
    missing = 0
    trajectories = []
    for case in result.cases:
        if progress is not None:
            progress(1)
        picture, wanted = item.picture(case), base.picture(case)
        if picture is None or wanted is None:
            missing += 1
            continue
        _score_picture(item, base, case, picture, wanted, reader, scorers)
        steps = _trajectory(item, base, case)
        if steps is not None:
            trajectories.append(steps)
            item.scores.set("latent_sqnr", case.key, steps[-1])
    if missing:
        result.gaps.append(f"{item.scores.name}: {missing} of {len(result.cases)} pictures missing")
    lengths = {len(steps) for steps in trajectories}
    if len(lengths) == 1:
        columns = zip(*trajectories, strict=True)
        item.scores.steps = [sum(column) / len(trajectories) for column in columns]


def _score_picture(item, base, case, picture, wanted, reader, scorers) -> None:
    scores, missing = item.scores, missing_packages()
    if item is not base:
        for name, function in PAIR_FUNCTIONS.items():
            if name in missing:
                continue
            try:
                scores.set(name, case.key, function(wanted, picture))
            except OpError as error:
                raise CompareError(f"{scores.name}, {case.file_stem}: {error}") from error
    read = (item.read or {}).get(case.key)
    readable = read is not None or reader is not None
    if case.text and readable and "ocr_exact" not in missing:
        read = reader(picture) if read is None else read
        for name, value in ocr_scores(case.text, read).items():
            scores.set(name, case.key, value)
    for name, scorer in scorers.items():
        value = scorer(wanted, picture, case)
        if value is not None:
            scores.set(name, case.key, value)


def _trajectory(item: Rendered, base: Rendered, case: Case) -> list[float] | None:
    if item is base:
        return None
    ours, theirs = item.latents(case), base.latents(case)
    return None if ours is None or theirs is None else latent_sqnr(theirs, ours)


def pictures_in(folder: Path) -> dict[str, Path]:
    """Name without suffix -> file, for the pictures of a folder, in the order of their names.

    Raises CompareError where there are none, and for two that differ by their suffixes alone.
    """
    files: dict[str, Path] = {}
    for file in sorted(f for f in folder.glob("*") if f.suffix.lower() in _SUFFIXES):
        if files.setdefault(file.stem, file) is not file:
            raise CompareError(
                "two pictures of one name",
                file=file,
                found=f"{files[file.stem].name}, {file.name}",
                hint="Which one belongs to the level? Move the other one away.",
            )
    if not files:
        raise CompareError("no picture in the folder", file=folder, needed="PNG, WebP or JPEG")
    return files


def folder_cases(
    reference: Mapping[str, Path], prompts: Mapping[str, str]
) -> list[tuple[str, Case]]:
    """(name, case) for every picture of the reference's, given as ``pictures_in`` finds them.

    ``prompts`` maps a file stem to its prompt; a picture without one has no text metrics. Pictures
    of one prompt are its seeds, numbered as they come: together they are one unit of resampling.
    """
    counts: Counter[str] = Counter()
    cases = []
    for stem, file in reference.items():
        prompt = prompts.get(stem)
        name = stem if prompt is None else prompt
        width, height = read_picture(file).size
        text = None if prompt is None else text_asked(prompt)
        cases.append((stem, Case(name, counts[name], width, height, text=text)))
        counts[name] += 1
    return cases


def rendered_folders(
    folders: Mapping[str, Path], reference: str, prompts: Mapping[str, str]
) -> tuple[list[Rendered], list[Case], list[str]]:
    """Pictures already rendered, one folder a system, the same file names in all: what ``score``
    takes, the cases of the reference's pictures, and notes on pictures that only others have.

    Raises CompareError for a folder that is not there or empty, for an unknown reference, and for
    one that shares no file name with the reference's; PictureError for a picture that is damaged.
    """
    check_reference(reference, list(folders))
    for name, folder in folders.items():
        if not folder.is_dir():
            raise CompareError(f"no folder of pictures for {name!r}", file=folder)
    files = {name: pictures_in(folder) for name, folder in folders.items()}
    pairs = folder_cases(files[reference], prompts)
    stems = {case.key: stem for stem, case in pairs}
    notes = []
    for name, others in files.items():
        if others.keys().isdisjoint(stems.values()):
            raise CompareError(
                f"{name!r} shares no file name with the reference",
                file=folders[name],
                found=", ".join(list(others)[:3]),
                needed=", ".join(sorted(stems.values())[:3]),
                hint="Give the pictures of one prompt and seed the same name in every folder.",
            )
        more = len(others.keys() - set(stems.values()))
        if more:
            notes.append(f"{name}: {more} pictures left out that the reference does not have")

    def system(name: str, pictures: Mapping[str, Path]) -> Rendered:
        def picture(case: Case) -> Image.Image | None:
            file = pictures.get(stems[case.key])
            return None if file is None else read_picture(file)

        return Rendered(SystemScores(name, "", 0), picture)

    rendered = [system(name, pictures) for name, pictures in files.items()]
    return rendered, [case for _, case in pairs], notes


def read_captions_file(file: Path) -> dict[str, str]:
    """``{"file name": prompt}`` -> file stem -> prompt. Names may have suffixes, and prompts may be
    JSON captions themselves. Raises CompareError for another content."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CompareError(f"is no JSON: {error}", file=file) from error
    if not isinstance(data, dict):
        raise CompareError("is no JSON object", file=file, needed='{"file name": "prompt"}')
    return {
        Path(name).stem: prompt if isinstance(prompt, str) else json.dumps(prompt)
        for name, prompt in data.items()
    }
