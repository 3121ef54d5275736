"""A sentence, JSON or both, as people type them -> a caption in the schema.

Without a language model: the sentence describes the picture as a whole and its subject, and the
words that it quotes become text elements. `write` has the language model's way.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice

from ..errors import OpError
from .check import is_stripped, names_key, unfenced
from .schema import COMPOSITION, TOP, ordered

EMPTY = "Type a sentence that says what to paint; words in quotes are written in the picture."
# what opens a quotation -> what closes it
_QUOTES = {'"': '"', "“": "”", "„": "“”", "«": "»", "»": "«", "「": "」", "『": "』", "‘": "’"}
_OPENS_AFTER = re.compile(r"[\s(\[{:;,—–-]")
_CLOSES_BEFORE = re.compile(r"[\s)\]}.,;:!?…—–'-]")
_LONGEST_QUOTE = 400  # characters; more is a forgotten quotation mark
_BRACES = 100  # that are tried as the beginning of JSON
_LIST = re.compile(r"\[\s*\{\s*[\"'“}]")  # what begins as a list of objects
_FENCE_MARK = re.compile(r"```\w*")
_STRAIGHT = "\"'"
_DECODER = json.JSONDecoder()
_LEFT = "the scene that the description names, filling the whole frame"
_DRAWN = "written exactly so, in large, legible letters that suit the picture"


@dataclass(frozen=True)
class Typed:
    """What somebody typed: the sentence (or ""), and the caption in JSON beside it (or None)."""

    sentence: str
    caption: dict | None = None


def read_typed(text: str) -> Typed:
    """Takes a sentence and a JSON caption apart, in whichever order they stand.

    OpError where there is nothing, or what begins as JSON or names a caption's key is none, as its
    keys would be painted as quoted words. Braces in a sentence are text.
    """
    stripped = unfenced(text)
    if not stripped:
        raise OpError("the caption is empty", hint=EMPTY)
    if _LIST.match(stripped):
        raise OpError(
            "this JSON is a list, and a caption is one object",
            hint="Type the caption alone, from its first { to its last }; a list of elements "
            'belongs into it, as {"compositional_deconstruction": {"elements": [...]}}.',
        )
    first: Exception | None = None
    for match in islice(re.finditer(r"\{", stripped), _BRACES):
        try:
            found, end = _DECODER.raw_decode(stripped, match.start())
        except (ValueError, RecursionError) as error:
            if match.start() == 0:
                raise _no_json(error) from error
            first = first or error
            continue
        if not any(key in TOP or key in COMPOSITION for key in found):
            if match.start() == 0:
                raise _no_caption(found)
            continue
        around = (stripped[: match.start()], stripped[end:])
        beside = (_FENCE_MARK.sub("", words).strip() for words in around)
        return Typed(" ".join(filter(None, beside)), found)
    if first is not None and names_key(stripped):
        raise _no_json(first) from first
    if is_stripped(stripped):
        raise OpError(
            "the JSON caption has lost its braces",
            hint="Copy it again, from its first { to its last }.",
        )
    return Typed(stripped)


def _no_json(error: Exception) -> OpError:
    return OpError(
        f"the caption has JSON that cannot be read: {error}",
        hint="Mend the JSON at that place, or type a sentence instead.",
    )


def _no_caption(found: dict) -> OpError:
    return OpError(
        "this JSON is no caption",
        found=f"the keys {list(found)[:5]}",
        needed=f"keys of the schema: {', '.join(TOP)}",
    )


def quoted(sentence: str) -> list[str]:
    """The words in quotation marks, in their order, each once; apostrophes and inches are none."""
    found: list[str] = []
    at = 0
    while at < len(sentence):
        end = _quotation_end(sentence, at)
        if end is None:
            at += 1
            continue
        words = sentence[at + 1 : end].strip()
        if words not in found:
            found.append(words)
        at = end + 1
    return found


def _quotation_end(sentence: str, at: int) -> int | None:
    """Where the quotation that opens at ``at`` closes; None if none opens there."""
    mark = sentence[at]
    closing = "'" if mark == "'" else _QUOTES.get(mark)
    before = sentence[at - 1] if at else " "
    if closing is None or (mark in f"{_STRAIGHT}‘" and not _OPENS_AFTER.match(before)):
        return None
    for end in range(at + 1, min(len(sentence), at + _LONGEST_QUOTE)):
        after = sentence[end + 1] if end + 1 < len(sentence) else " "
        if sentence[end] in closing and (
            mark not in f"{_STRAIGHT}‘" or _CLOSES_BEFORE.match(after)
        ):
            return end if sentence[at + 1 : end].strip() else None
    return None


def compose(typed: Typed, style: dict[str, str] | None = None) -> dict:
    """The caption of what was typed; what the JSON says stays, the sentence and style add to it.

    OpError where the JSON's composition or elements are of another kind.
    """
    given = typed.caption or {}
    composition = composition_of(typed)
    caption = {key: value for key, value in given.items() if key in TOP}
    described = [typed.sentence, caption.get("high_level_description") or ""]
    if any(described):
        caption["high_level_description"] = " ".join(filter(None, map(str, described)))
    if style is not None and "style_description" not in caption:
        caption["style_description"] = dict(style)
    elements = list(composition.get("elements", []))
    if typed.sentence and not elements:
        elements.append({"type": "obj", "desc": typed.sentence})
    elements += missing_texts(quoted(typed.sentence), elements)
    caption["compositional_deconstruction"] = {
        **composition,
        "background": composition.get("background") or _LEFT,
        "elements": elements,
    }
    return ordered(caption)


def composition_of(typed: Typed) -> dict:
    """Background and elements of the JSON; at its top too, where people write them by hand.

    OpError where they are of another kind.
    """
    given = typed.caption or {}
    loose = {key: given[key] for key in COMPOSITION if key in given}
    composition = given.get("compositional_deconstruction", loose)
    if not isinstance(composition, dict):
        raise OpError("compositional_deconstruction must be an object", found=repr(composition))
    if not isinstance(composition.get("elements", []), list):
        raise OpError("elements must be a list", found=repr(composition["elements"]))
    return composition


def missing_texts(words: list[str], elements: list) -> list[dict[str, str]]:
    """Text elements for those of ``words`` that no text element of ``elements`` writes."""
    written = [
        " ".join(str(element.get("text", "")).split())
        for element in elements
        if isinstance(element, dict) and element.get("type") == "text"
    ]
    return [
        {"type": "text", "text": text, "desc": _DRAWN}
        for text in words
        if not any(" ".join(text.split()) in other for other in written)
    ]


def as_text(caption: dict) -> str:
    """A caption as it is sent: minified JSON, other scripts as they are."""
    return json.dumps(caption, ensure_ascii=False, separators=(",", ":"))
