"""Checks a caption against the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .schema import (
    BBOX_MAX,
    COMPOSITION,
    ELEMENT,
    PHOTO_STYLE,
    REQUIRED,
    TOP,
    kind_of,
    ordered,
    style_order,
)

PLAIN_TEXT = (
    "This is plain text. The model was trained on JSON captions: with plain text, words in the "
    "picture are rarely legible, and sometimes it paints a placeholder card. Type it into Caption "
    "(Ideogram 4), which makes a caption of it."
)

#: What CLIP Text Encode sends for a JSON caption that was typed into it.
STRIPPED = (
    "This is a JSON caption without its braces. ComfyUI's page reads what is typed into a text box "
    "with dynamic prompts, as that of CLIP Text Encode, as {this|or that}: it took the braces off, "
    "and what stood behind // too. Type the caption into Caption (Ideogram 4), or make it with "
    "Build JSON Prompt (Ideogram), and connect that to the text of CLIP Text Encode."
)
# What chat programs put around JSON
_FENCE = re.compile(r"```\w*\s*([\[{].*[\]}])\s*```", re.DOTALL)
_QUOTED = 80  # characters of a wrong value that an error shows
_KEY = re.compile(r'"?\b(?:' + "|".join(TOP[1:]) + r')\b"?\s*:')


@dataclass
class Verdict:
    """The caption as it should be sent, and what is wrong with the one that came in."""

    caption: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people: one finding a line."""
        lines = [f"error: {e}" for e in self.errors] + [f"warning: {w}" for w in self.warnings]
        return "\n".join(lines) or "The caption follows the schema."


def is_plain(text: str) -> bool:
    """Whether a caption is no JSON and not meant to be."""
    return not text.lstrip().startswith(("{", "["))


def is_stripped(text: str) -> bool:
    """Whether a caption is JSON that lost its braces: none left, but a key of the top level."""
    return is_plain(text) and "{" not in text and names_key(text)


def names_key(text: str) -> bool:
    """Whether a key of a caption stands in a text, as JSON writes it: no sentence has one."""
    return _KEY.search(text) is not None


def unfenced(text: str) -> str:
    """The text without spaces, a byte order mark or a code fence around it."""
    stripped = text.strip().removeprefix("\ufeff")
    fenced = _FENCE.fullmatch(stripped)
    return stripped if fenced is None else fenced[1]


def check_caption(text: str) -> Verdict:
    """Errors: what the model cannot read as meant. Warnings: what it reads less well.

    The returned caption is minified JSON with the keys in the trained order; plain text and broken
    JSON come back unchanged.
    """
    verdict = Verdict(text)
    stripped = unfenced(text)
    if stripped != text.strip().removeprefix("\ufeff"):
        verdict.warnings.append("It stood in a code fence, which is taken off.")
    if not stripped:
        verdict.errors.append("The caption is empty.")
        return verdict
    if is_stripped(stripped):
        verdict.errors.append(STRIPPED)
        return verdict
    if is_plain(stripped):
        verdict.warnings.append(PLAIN_TEXT)
        return verdict
    try:
        caption = json.loads(stripped)
    except (ValueError, RecursionError) as error:
        verdict.errors.append(f"This is no valid JSON: {error}.")
        return verdict
    if not isinstance(caption, dict):
        verdict.errors.append("The caption must be one JSON object, {...}.")
        return verdict
    _check_top(caption, verdict)
    verdict.caption = json.dumps(ordered(caption), ensure_ascii=False, separators=(",", ":"))
    return verdict


def _check_top(caption: dict, verdict: Verdict) -> None:
    _check_keys("the caption", caption, TOP, ("compositional_deconstruction",), verdict)
    if "high_level_description" not in caption:
        verdict.warnings.append("high_level_description is missing; one sentence helps.")
    _check_strings("the caption", caption, ("aspect_ratio", "high_level_description"), verdict)
    if "style_description" in caption:
        _check_style(caption["style_description"], verdict)
    if "compositional_deconstruction" in caption:
        _check_composition(caption["compositional_deconstruction"], verdict)


def _check_style(style: object, verdict: Verdict) -> None:
    if not isinstance(style, dict):
        verdict.errors.append("style_description must be an object.")
        return
    if "photo" in style and "art_style" in style:
        verdict.errors.append("style_description has both photo and art_style; keep one.")
    _check_keys("style_description", style, style_order(style), (), verdict)
    _check_strings("style_description", style, (*PHOTO_STYLE[:-1], "art_style"), verdict)


def _check_composition(composition: object, verdict: Verdict) -> None:
    name = "compositional_deconstruction"
    if not isinstance(composition, dict):
        verdict.errors.append(f"{name} must be an object.")
        return
    _check_keys(name, composition, COMPOSITION, REQUIRED[name], verdict)
    _check_strings(name, composition, ("background",), verdict)
    elements = composition.get("elements", [])
    if not isinstance(elements, list):
        verdict.errors.append("elements must be a list.")
        return
    for number, element in enumerate(elements, 1):
        _check_element(f"element {number}", element, verdict)


def _check_element(name: str, element: object, verdict: Verdict) -> None:
    if not isinstance(element, dict):
        verdict.errors.append(f"{name} must be an object.")
        return
    kind = kind_of(element)
    if kind is None:
        said = json.dumps(element.get("type"))[:_QUOTED]
        verdict.errors.append(f'{name}: type must be "obj" or "text", not {said}.')
        return
    _check_keys(name, element, ELEMENT[kind], REQUIRED[kind], verdict)
    _check_strings(name, element, ("text", "desc"), verdict)
    if kind == "text" and not str(element.get("text", "")).strip():
        verdict.errors.append(f"{name}: the text to write is empty.")
    if "bbox" in element:
        verdict.errors.extend(f"{name}: {problem}" for problem in _bbox_problems(element["bbox"]))


def _bbox_problems(bbox: object) -> Iterator[str]:
    numbers = isinstance(bbox, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in bbox
    )
    if not numbers or len(bbox) != 4:
        yield "bbox must be four numbers, [ymin, xmin, ymax, xmax]."
        return
    if not all(0 <= v <= BBOX_MAX for v in bbox):
        yield f"bbox must lie within 0 and {BBOX_MAX}, whatever the size of the picture."
    if bbox[0] >= bbox[2] or bbox[1] >= bbox[3]:
        yield "bbox is empty: its order is [ymin, xmin, ymax, xmax]."


def _check_keys(name: str, found: dict, known: tuple, required: tuple, verdict: Verdict) -> None:
    verdict.errors.extend(f"{name} lacks {key}." for key in required if key not in found)
    unknown = [key for key in found if key not in known]
    if unknown:
        verdict.warnings.append(f"{name} has keys the model was not trained on: {unknown}.")
    there = [key for key in found if key in known]
    wanted = [key for key in known if key in found]
    if there != wanted:
        verdict.warnings.append(f"{name}: the order of its keys was {there}, trained is {wanted}.")


def _check_strings(name: str, found: dict, keys: tuple, verdict: Verdict) -> None:
    verdict.errors.extend(
        f"{name}: {key} must be text." for key in keys if not isinstance(found.get(key, ""), str)
    )
