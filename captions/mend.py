"""What a language model wrote, made a caption: mended where that can be, else left out.

A model that is bounded in tokens ends in the middle of a word, and one that nothing constrains
writes what it likes. What reaches the encoder is a caption all the same: what is missing comes from
the caption that `compose` makes of the sentence, and each thing that was done is said.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from .check import check_caption
from .compose import Typed, as_text, compose, composition_of, missing_texts, quoted
from .schema import REQUIRED, kind_of, ordered

NOTHING = "What the encoder wrote is no caption; this one is made of the sentence alone"
CUT = "What the encoder wrote ended early; it was closed there"
_TRIED = 200  # places to close unfinished JSON at
_CLOSING = {"{": "}", "[": "]"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")


@dataclass(frozen=True)
class Mended:
    """A caption without errors, and what was done to what was written, for people."""

    caption: str
    notes: tuple[str, ...] = field(default=())


def mend(written: str, typed: Typed, style: dict[str, str] | None = None) -> Mended:
    """The caption that ``written`` is or nearly is.

    Missing parts come from what was typed (`compose`); background and elements that were typed in
    JSON stay, and every word that the sentence quotes stands in a text element.
    """
    plain = compose(typed, style)
    found, whole = read_json(written)
    if found is None:
        return Mended(as_text(plain), (NOTHING,))
    notes = [] if whole else [CUT]
    caption = _merged(found, plain, typed, notes)
    if caption is None:
        return Mended(as_text(plain), (NOTHING,))
    elements = caption["compositional_deconstruction"]["elements"]
    forgotten = missing_texts(quoted(typed.sentence), elements)
    if forgotten:
        names = ", ".join(json.dumps(e["text"], ensure_ascii=False) for e in forgotten)
        notes.append(f"It had left out the words {names}; they are text elements now")
        elements += forgotten
    text = as_text(ordered(caption))
    if check_caption(text).errors:
        return Mended(as_text(plain), (NOTHING,))
    return Mended(text, tuple(notes))


def read_json(text: str) -> tuple[dict | None, bool]:
    """(the first JSON object in a text, whether it was whole); None where there is none.

    One that ends early is closed where it ends, or behind its last whole value.
    """
    start = text.find("{")
    if start < 0:
        return None, False
    text = text[start:]
    try:
        return _object(json.JSONDecoder().raw_decode(text)[0]), True
    except (ValueError, RecursionError):
        pass
    for candidate in _closed(text):
        try:
            return _object(json.loads(candidate, strict=False)), False
        except (ValueError, RecursionError):
            continue
    return None, False


def _object(value: Any) -> dict | None:
    return value if isinstance(value, dict) else None


def _closed(text: str) -> list[str]:
    """The text closed at its end, then at each place before where a value was whole."""
    stack: list[str] = []
    places: list[tuple[int, str]] = []
    inside = escaped = False
    for i, character in enumerate(text):
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in _CLOSING:
            stack.append(_CLOSING[character])
            places.append((i + 1, "".join(reversed(stack))))
        elif stack and character == stack[-1]:
            stack.pop()
            places.append((i + 1, "".join(reversed(stack))))
        elif character == ",":
            places.append((i, "".join(reversed(stack))))
    ends = "".join(reversed(stack))
    unfinished = text[:-1] if escaped else re.sub(r"\\u[0-9a-fA-F]{0,3}$", "", text)
    whole = [f'{unfinished}"{ends}' if inside else f"{text}{ends}"]
    return whole + [text[:at] + close for at, close in reversed(places[-_TRIED:])]


def _merged(found: dict, plain: dict, typed: Typed, notes: list[str]) -> dict | None:
    """Known parts of ``found`` that are usable, else those of ``plain``; None where none is."""
    composition = found.get("compositional_deconstruction")
    composition = composition if isinstance(composition, dict) else found
    own = plain["compositional_deconstruction"]
    caption = dict(plain)
    description = _words(found.get("high_level_description"))
    background = _words(composition.get("background"))
    elements = composition.get("elements")
    listed = elements if isinstance(elements, list) else []
    usable = [e for e in map(_element, listed) if e is not None]
    if len(usable) < len(listed):
        notes.append(f"{len(listed) - len(usable)} of its elements said nothing; they are left out")
    absent = {"description": description, "background": background, "elements": usable}
    lacking = [name for name, value in absent.items() if not value]
    if len(lacking) == len(absent):
        return None
    if lacking:
        notes.append(f"It lacked {' and '.join(lacking)}; taken from the sentence")
    if description:
        caption["high_level_description"] = description
    given = composition_of(typed)
    caption["compositional_deconstruction"] = {
        **own,
        "background": given.get("background") or background or own["background"],
        "elements": [*given.get("elements", []), *usable] if usable else list(own["elements"]),
    }
    return caption


def _element(value: Any) -> dict | None:
    """An element with its needed keys alone, or None for one that says nothing."""
    kind = kind_of(value) if isinstance(value, dict) else None
    if kind is None:
        return None
    words = {key: _words(value.get(key)) for key in REQUIRED[kind][1:]}
    return {"type": kind, **words} if all(words.values()) else None


def _words(value: Any) -> str:
    """Text without what no tokenizer and no PNG can hold; "" for what is none."""
    return _UNPRINTABLE.sub("", value).strip() if isinstance(value, str) else ""
