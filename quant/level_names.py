"""Levels as people write them: of other tools, of shop windows, with or without blanks."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection

_ROTATED = "INT8 W8A8 rotated"
_BETTER = f"{{}}: taken as {_ROTATED}, the nearer one of its size; without: 'INT8 W8A8'"
_ALIASES = {
    "int8": _ROTATED,
    "i8": _ROTATED,
    "w8a8": _ROTATED,
    "int8rotated": _ROTATED,
    "convrot": _ROTATED,
    "int8convrot": _ROTATED,
    **{f"q{bits}": f"Q{bits}_K" for bits in (2, 3, 4, 5, 6)},
    "q8": "Q8_0",
}
# not the same thing, but what is meant here by it
_SUGGESTED = {"int4": "W4A8", "w4a4": "W4A8", "w4a16": "W4A8", "w6a6": "W6A8", "int6": "W6A8"}
_LEFT_OPEN = ("int8", "i8", "w8a8")  # which may mean either
_LEAST_ALIKE = 0.5  # of names that may be meant, by difflib's measure
_MIX = re.compile(r"q([2-6])k(s|m|l|xl)")


def resolve(text: str, levels: Collection[str]) -> tuple[str | None, str | None]:
    """(the level of ``levels`` that ``text`` means, what to say of it); None for no level.

    Case, blanks, dashes, dots and underscores do not matter.
    """
    wanted = _plain(text)
    for level in levels:
        if _plain(level) == wanted:
            return level, None
    mix = _MIX.fullmatch(wanted)
    if mix is not None and (level := f"Q{mix[1]}_K") in levels:
        return level, (
            f"{text}: llama.cpp's mixes are not made: every linear of the blocks is {level}; for "
            "larger types where they help most, ask for a size instead"
        )
    level = _ALIASES.get(wanted)
    if level not in levels:
        return None, None
    return level, _BETTER.format(text) if wanted in _LEFT_OPEN else None


def nearest(text: str, levels: Collection[str]) -> str | None:
    """The level whose name is most like ``text``; None where none is."""
    suggested = _SUGGESTED.get(_plain(text))
    if suggested in levels:
        return suggested
    wanted = _plain(text)

    def likeness(level: str) -> tuple[int, float]:
        alike = difflib.SequenceMatcher(None, wanted, _plain(level)).ratio()
        pairs = zip(wanted, _plain(level), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), alike

    best = max(levels, key=likeness)
    return best if likeness(best)[1] >= _LEAST_ALIKE else None


def _plain(text: str) -> str:
    return re.sub(r"[\s_.-]", "", text).lower()
