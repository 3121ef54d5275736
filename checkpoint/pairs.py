"""Two files that are the copies of one model: which belong together, and what a device holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath

from ..errors import PairMismatchError
from .branches import OneBranch
from .checkpoints import Checkpoint, check_pair
from .copies import CONDITIONAL, UNCONDITIONAL, without_copy_words
from .level_order import AUTO

_SIBLINGS = 2.0  # above any ratio of two names
BOTH, ALTERNATING, STREAMED = "both", "alternating", "streamed"
# Activations, attention and the VAE's decoder at 1024 px, beside the weights.
WORKING_MEMORY = 1_900_000_000


def residency(sizes: tuple[int, int], memory: int, working: int = WORKING_MEMORY) -> str:
    """What a device holds: ``both`` copies, one (``alternating``), or none whole (``streamed``).

    sizes: bytes of the two copies. memory: of the device. working: what a pass needs beside them.
    """
    if sum(sizes) + working <= memory:
        return BOTH
    return ALTERNATING if max(sizes) + working <= memory else STREAMED


def levels_of(first: str, second: str | None) -> tuple[str, ...]:
    """The levels of a pair, conditional first: each once."""
    return tuple(dict.fromkeys(level for level in (first, second) if level is not None))


@dataclass(frozen=True)
class Candidate:
    """A file among the host's models that holds one or both copies."""

    name: str
    path: Path
    header: Checkpoint

    def copy_bytes(self) -> int:
        """Bytes of one copy's weights, as stored."""
        return self.header.size // len(self.header.copies)


@dataclass(frozen=True)
class Pair:
    """The files of one level: a conditional copy, and an unconditional one if there is any.

    ``level`` is the conditional copy's; the other may have a lower one. One branch (``one_branch``
    says why) has no other copy and lacks none.
    """

    level: str
    conditional: Candidate
    unconditional: Candidate | None
    notes: tuple[str, ...] = ()

    @property
    def levels(self) -> tuple[str, ...]:
        """The level of each copy there is, conditional first; one where both have the same."""
        second = self.unconditional
        return levels_of(self.level, None if second is None else second.header.level)

    @property
    def label(self) -> str:
        """The levels for people: ``Q4_K``, or ``INT8 W8A8 rotated + Q4_K``."""
        return " + ".join(self.levels)

    @property
    def one_branch(self) -> OneBranch | None:
        """Why these files need no guidance; None for a model of two copies."""
        return self.conditional.header.one_branch

    @property
    def complete(self) -> bool:
        """Whether nothing is missing: both copies, or one branch."""
        return self.unconditional is not None or self.one_branch is not None

    def weight_bytes(self) -> tuple[int, int]:
        """(conditional, unconditional) bytes."""
        second = self.unconditional
        return self.conditional.copy_bytes(), 0 if second is None else second.copy_bytes()


def find_pair(level: str, candidates: Iterable[Candidate]) -> Pair | None:
    """The pair of that level whose file names fit best; None without a conditional copy.

    A file with both copies wins over two files; then files of one name in sibling folders; of other
    two files, the names must differ least once the words for the copy are taken out. The models
    must be of one size. One branch comes after two files and before a conditional copy alone.
    """
    there = [c for c in candidates if c.header.level == level]
    conditional = [c for c in there if "conditional" in c.header.copies]
    if not conditional:
        return None
    both = [c for c in conditional if "unconditional" in c.header.copies]
    pairs = [(c, c) for c in both] or [(c, partner_of(c, there)) for c in conditional]
    pairs.sort(key=lambda pair: (_lacking(*pair), -_likeness(*pair), pair[0].name.casefold()))
    first, second = pairs[0]
    chosen = {first.name, second.name if second else first.name}
    others = sorted(c.name for c in there if c.name not in chosen)
    notes = (f"other files of this level: {', '.join(others)}",) if others else ()
    return Pair(level, first, second, notes)


def _lacking(first: Candidate, second: Candidate | None) -> int:
    if second is not None:
        return 0
    return 2 if first.header.one_branch is None else 1


def partner_of(conditional: Candidate, candidates: Iterable[Candidate]) -> Candidate | None:
    """The unconditional copy that goes best with a conditional one, by size and then by name."""
    fitting = [c for c in candidates if _fit(conditional, c)]
    return max(fitting, key=lambda c: _likeness(conditional, c), default=None)


def _fit(conditional: Candidate, other: Candidate) -> bool:
    try:
        check_pair(conditional.header, other.header)
    except PairMismatchError:
        return False
    return True


def _likeness(first: Candidate, second: Candidate | None) -> float:
    if second is None:
        return 0.0
    one, other = PurePosixPath(first.name), PurePosixPath(second.name)
    siblings = one.parent.parent == other.parent.parent and one.parent != other.parent
    if siblings and one.name.casefold() == other.name.casefold():
        return _SIBLINGS
    return SequenceMatcher(None, _bare(first.name), _bare(second.name), autojunk=False).ratio()


def _bare(name: str) -> str:
    return re.sub(r"[-_. ]+", " ", without_copy_words(name)).strip()


def holders(level: str, copy: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Files that hold a copy at a level and need the other one; a copy that nothing told counts
    where it is the level's only one."""
    there = [c for c in candidates if level in (AUTO, c.header.level)]
    unsure = [c for c in there if c.header.copy_assumed]
    return [
        c
        for c in there
        if copy in c.header.copies
        and c.header.one_branch is None
        and not (c in unsure and len(unsure) > 1)
    ]


def pairs_of_levels(
    levels: Iterable[tuple[str, str]], candidates: Sequence[Candidate]
) -> list[Pair]:
    """The best pair of files for each (conditional, unconditional) of ``levels`` that is there."""
    found = []
    for first, second in levels:
        conditional = holders(first, CONDITIONAL, candidates)
        others = holders(second, UNCONDITIONAL, candidates) if conditional else []
        pairs = [(c, partner_of(c, others)) for c in conditional]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if pairs:
            best = max(pairs, key=lambda pair: (_likeness(*pair), pair[0].name.casefold()))
            found.append(Pair(best[0].header.level, *best))
    return found
