"""What the loader's report says of the levels of a pair: of one, or of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..checkpoint.copies import COPIES
from ..checkpoint.pairs import Candidate, Pair

PLAIN_LEVEL = "BF16"


def copies(pair: Pair) -> list[tuple[str, Candidate]]:
    both = zip(COPIES, (pair.conditional, pair.unconditional), strict=True)
    return [(copy, candidate) for copy, candidate in both if candidate is not None]


def by_level(pair: Pair, say: Callable[[str], str]) -> str:
    """What there is to say of the level; of two, of each in its copy's name."""
    said = {copy: say(level) for copy, level in zip(COPIES, pair.levels, strict=False)}
    if len(set(said.values())) == 1:
        return said[COPIES[0]]
    return "; ".join(f"{copy} {words}" for copy, words in said.items())


def protected_lines(pair: Pair) -> list[str]:
    """Of the conditional copy; of both where they are of two levels."""
    if len(pair.levels) == 1:
        return [_protected_line(pair.conditional)]
    return [f"{copy}, {_protected_line(candidate)}" for copy, candidate in copies(pair)]


def _protected_line(candidate: Candidate) -> str:
    if candidate.header.level == PLAIN_LEVEL:
        return "quantized: nothing"
    protected: Sequence[str] = candidate.header.protected
    if not protected:
        return "kept in 16 bits: no linear"
    shown = ", ".join(list(protected)[:4]) + (", ..." if len(protected) > 4 else "")
    return f"kept in 16 bits: {len(protected)} linears ({shown})"
