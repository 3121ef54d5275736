"""From what somebody typed and picked to the caption that the encoder gets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import OpError
from .check import check_caption, unfenced
from .compose import Typed, as_text, compose, read_typed
from .mend import NOTHING, mend
from .ratio import AUTO, parse_ratio
from .styles import NONE, STYLES

logger = logging.getLogger(__name__)
Ratio = tuple[int, int]
Write = Callable[[str, Ratio], str]
"""(sentence, ratio) -> what a language model wrote."""

UNCHANGED = "JSON passes as it was typed"
_SEEN_NOTHING = "Try another seed, or type what is in the picture."


@dataclass(frozen=True)
class Made:
    """A caption without errors, its ratio, and what is to be said of it, for people."""

    caption: str
    ratio: Ratio
    notes: tuple[str, ...] = ()
    written: bool = False  # by a language model


def make_caption(
    text: str,
    *,
    ratio: str = AUTO,
    style: str = NONE,
    write: Write | None = None,
    picture: bool = False,
) -> Made:
    """The caption of a sentence, of JSON, or of both.

    JSON alone passes unchanged. With ``write`` a language model writes the caption, and what it
    wrote is mended; ``picture``: it looks at one, so that nothing need be typed. OpError for an
    empty text, for a caption with errors, for a ratio or style that is none.
    """
    if style not in STYLES:
        raise OpError("no such style", found=repr(style), needed=", ".join(STYLES))
    looking = picture and write is not None
    typed = Typed("") if looking and not text.strip() else read_typed(text)
    stated = (typed.caption or {}).get("aspect_ratio")
    shape = parse_ratio(ratio if ratio != AUTO else stated or "1:1")
    notes = []
    if stated is not None and ratio != AUTO and stated != ratio:
        notes.append(f"The caption says {json.dumps(stated)} and the picture gets {ratio}")
    if typed.caption is not None and not typed.sentence:
        unwrapped = text if text.lstrip().startswith("{") else unfenced(text)
        return Made(unwrapped, shape, (*notes, *_passed(text, style, write)))
    plain = as_text(compose(typed, STYLES[style]))
    errors = [] if looking else check_caption(plain).errors  # those of the JSON beside a sentence
    if errors:
        raise _refused(errors)
    if write is None:
        return Made(plain, shape, tuple(notes))
    mended = mend(write(typed.sentence, shape), typed, STYLES[style])
    if looking and not typed.sentence and NOTHING in mended.notes:
        raise OpError("what the encoder wrote of the picture is no caption", hint=_SEEN_NOTHING)
    for note in mended.notes:
        logger.warning("caption: %s", note)
    return Made(mended.caption, shape, (*notes, *mended.notes), written=True)


def _passed(text: str, style: str, write: Write | None) -> list[str]:
    """What is said of JSON that passes unchanged; OpError where it has errors."""
    verdict = check_caption(text)
    if verdict.errors:
        raise _refused(verdict.errors)
    off = [name for name, on in (("style", style != NONE), ("expand", write is not None)) if on]
    said = f"{UNCHANGED}; {' and '.join(off)} left out" if off else UNCHANGED
    return [said, *verdict.warnings]


def _refused(errors: list[str]) -> OpError:
    return OpError("the caption has errors: " + " ".join(errors))
