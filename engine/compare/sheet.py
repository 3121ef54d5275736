"""The comparison's contact sheets: prompts down, systems across, the reference first."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image, ImageChops

from ..sheet import Row, contact_sheet
from .cases import Case
from .results import Comparison

_LONGEST = 90  # characters of a label
Picture = Callable[[str, Case], "Image.Image | None"]

#: Rows of the sheet: enough to look at, small enough for a picture viewer.
SHEET_CASES = 12

#: Differences are shown this many times too strong.
DIFFERENCE_GAIN = 8


def comparison_sheet(
    comparison: Comparison, picture: Picture, *, differences: bool = False
) -> Image.Image:
    """Prompts x systems, scores below; with ``differences``, distance maps beside the reference."""
    names = [comparison.reference]
    names += [s.name for s in comparison.systems if s.name != comparison.reference]
    rows = []
    for case in comparison.cases[:SHEET_CASES]:
        pictures = [picture(name, case) for name in names]
        if differences:
            pictures[1:] = [_difference(pictures[0], other) for other in pictures[1:]]
        lines = [f"seed {case.seed}", f"{case.width} x {case.height}"]
        remarks = [remark(comparison, name, case) for name in names]
        rows.append(Row(label(case), lines, pictures, remarks, calm=True))
    return contact_sheet(rows, names)


def label(case: Case) -> str:
    """What a row is called: the caption's own summary, else its beginning, else the prompt's id.

    A caption that is no JSON is its own summary.
    """
    summary = case.prompt.strip()
    with suppress(ValueError, RecursionError):
        caption = json.loads(summary)
        if isinstance(caption, dict):
            summary = str(caption.get("high_level_description") or case.text or "")
    summary = " ".join(summary.split()) or case.prompt_id
    return summary if len(summary) <= _LONGEST else f"{summary[: _LONGEST - 1].rstrip()}…"


def difference_map(reference: Image.Image, picture: Image.Image) -> Image.Image:
    """``|picture - reference| * 8`` a channel, clipped: black where the two agree."""
    difference = ImageChops.difference(reference.convert("RGB"), picture.convert("RGB"))
    strong = np.asarray(difference, dtype=np.uint16) * DIFFERENCE_GAIN
    return Image.fromarray(strong.clip(0, 255).astype(np.uint8))


def _difference(reference: Image.Image | None, picture: Image.Image | None) -> Image.Image | None:
    if reference is None or picture is None or reference.size != picture.size:
        return None
    return difference_map(reference, picture)


def remark(comparison: Comparison, name: str, case: Case) -> str:
    """What stands below one picture: its distance to the reference, and whether OCR read it."""
    values = comparison.system(name).values
    parts = []
    if case.key in values.get("psnr", {}):
        parts.append(f"{values['psnr'][case.key]:.1f} dB")
    if case.key in values.get("ocr_exact", {}):
        parts.append("read" if values["ocr_exact"][case.key] else "not read")
    return ", ".join(parts)
