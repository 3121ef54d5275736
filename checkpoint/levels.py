"""Which files a quantization level stands for on this machine, and what ``auto`` means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, NotIdeogram4Error, PairMismatchError, printable
from .checkpoints import Checkpoint
from .copies import CONDITIONAL, UNCONDITIONAL
from .level_order import AUTO, LEVELS, SAME, two_levels
from .listing import Listing
from .pairs import (
    ALTERNATING,
    BOTH,
    Candidate,
    Pair,
    find_pair,
    holders,
    pairs_of_levels,
    residency,
)
from .published import files_of


@dataclass
class Catalogue:
    """The Ideogram 4 files found, and those that look like it and cannot be read."""

    listing: Listing
    candidates: list[Candidate] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


def read_catalogue(listing: Listing, open_file: Callable[[Path], Checkpoint]) -> Catalogue:
    """Opens every file's header; other models are passed over, broken files are noted."""
    catalogue = Catalogue(listing)
    for name in listing.names:
        try:
            header = open_file(listing.paths[name])
        except NotIdeogram4Error:
            continue
        except (CheckpointError, OSError) as error:
            catalogue.broken[name] = str(error)
            continue
        catalogue.candidates.append(Candidate(name, listing.paths[name], header))
    return catalogue


def resolve(
    level: str,
    catalogue: Catalogue,
    order: Sequence[str],
    memory: int,
    *,
    with_base: bool = False,
    one_copy: bool = False,
    one_branch: bool = False,
    unconditional: str = SAME,
) -> Pair:
    """The files of `level`; for ``auto`` the first level of `order` that is there and fits.

    memory: bytes of the device. Fits, from best to worst: both copies and the working memory, one
    copy and the working memory, neither (then the smallest). Where two copies of a level do not
    fit, auto takes the unconditional one at a lower level (`level_order.two_levels`). It passes
    over files of linears only
    unless there is a base for them, over one branch where there are both copies of a level, and
    over a conditional copy alone, which has no guidance, unless there is nothing else; files that
    cannot be read are in the pair's notes, with the reason. one_copy: the conditional copy alone is
    wanted, and is all that has to fit. one_branch: a model that needs no other is, so that an error
    says to download one. unconditional: the level of that copy. CheckpointError says what is
    missing, PairMismatchError that the files do not say which copies they are.
    """
    check_level(level, AUTO)
    check_level(unconditional, SAME)
    if unconditional not in (SAME, level):
        return _asked_pair(level, unconditional, catalogue, order, memory, with_base)
    if level != AUTO:
        pair = find_pair(level, catalogue.candidates)
        if pair is None:
            raise _nothing_found(level, catalogue, one_branch=one_branch)
        return _wanted(_sure(pair, catalogue.candidates), one_copy)
    usable = [c for c in catalogue.candidates if with_base or not c.header.linears_only]
    pairs = [pair for pair in (find_pair(name, usable) for name in order) if pair is not None]
    if not pairs:
        raise _nothing_found(level, catalogue, one_branch=one_branch)
    if one_copy:
        pairs = [pair for pair in pairs if pair.one_branch is None] or pairs
    both = [pair for pair in pairs if pair.unconditional is not None]
    mixed = [] if one_copy else pairs_of_levels(two_levels(order), usable)
    complete = both or mixed or [pair for pair in pairs if pair.complete]
    if not complete and not one_copy:  # a level further down may be a whole model that says nothing
        pairs = [_sure(pair, usable) for pair in pairs]
    fitting = _fitting(pairs if one_copy else complete or pairs, memory, one_copy)
    if both and mixed:
        fitting = _finer(fitting, mixed, order, memory)
    pair = _wanted(_sure(fitting, usable), one_copy)
    return _with_unread(pair, catalogue)


def check_level(level: str, *others: str) -> None:
    """CheckpointError for a level that there is not: names come from workflows, so from anyone."""
    if level not in LEVELS and level not in others:
        raise CheckpointError(
            "there is no such level",
            found=printable(level),
            needed=", ".join((*others, *LEVELS)),
        )


def _with_unread(pair: Pair, catalogue: Catalogue) -> Pair:
    unread = tuple(f"passed over, {problem}" for problem in catalogue.broken.values())
    return replace(pair, notes=(*pair.notes, *unread))


def _asked_pair(
    level: str,
    unconditional: str,
    catalogue: Catalogue,
    order: Sequence[str],
    memory: int,
    with_base: bool,
) -> Pair:
    """A pair whose unconditional copy has a level of its own; ``auto`` is the first that fits."""
    there = catalogue.candidates
    if level == AUTO:
        there = [c for c in there if with_base or not c.header.linears_only]
    firsts = order if level == AUTO else (level,)
    found = pairs_of_levels(((first, unconditional) for first in firsts), there)
    if found:
        return _with_unread(_fitting(found, memory, False), catalogue)
    for copy, wanted in ((CONDITIONAL, level), (UNCONDITIONAL, unconditional)):
        if not holders(wanted, copy, there):
            raise _nothing_found(wanted, catalogue, copy)
    raise PairMismatchError(
        f"no conditional copy of {level} goes with an unconditional one of {unconditional}",
        found=", ".join(c.name for c in (*holders(level, CONDITIONAL, there),
                                         *holders(unconditional, UNCONDITIONAL, there))),
        needed="two files of one model, of which it is told which copy each is",
        hint="Pick both by name and switch on trust_files, or put cond and uncond into the names.",
    )  # fmt: skip


def _finer(equal: Pair, mixed: Sequence[Pair], order: Sequence[str], memory: int) -> Pair:
    """A pair of two levels in the place of two equal ones, where it is better and both copies fit.

    Better: the unconditional copy's level is tried before that of ``equal``, or is the same beside
    a more faithful conditional copy.
    """
    stays = residency(equal.weight_bytes(), memory) == BOTH
    for pair in mixed:
        if stays and order.index(pair.levels[-1]) > order.index(equal.level):
            break
        if residency(pair.weight_bytes(), memory) == BOTH:
            return pair
    return equal


def _wanted(pair: Pair, one_copy: bool) -> Pair:
    return replace(pair, unconditional=None) if one_copy else pair


def _fitting(pairs: Sequence[Pair], memory: int, one_copy: bool) -> Pair:
    def sizes(pair: Pair) -> tuple[int, int]:
        return _wanted(pair, one_copy).weight_bytes()

    for wanted in (BOTH, ALTERNATING):
        for pair in pairs:
            if residency(sizes(pair), memory) == wanted:
                return pair
    return min(pairs, key=lambda pair: sum(sizes(pair)))


def _sure(pair: Pair, candidates: Iterable[Candidate]) -> Pair:
    """The pair; PairMismatchError for half a one beside a file that may be its other half."""
    if pair.complete:
        return pair
    alike = [c for c in candidates if c is not pair.conditional and c.header.level == pair.level]
    there = (pair.conditional, *alike)
    unsure = [c.name for c in there if c.header.copy_assumed]
    if not alike or not unsure:
        return pair
    raise PairMismatchError(
        f"several files of {pair.level}, and nothing tells which one is the unconditional copy",
        file=unsure[0],
        found=", ".join(c.name for c in there),
        needed="one conditional and one unconditional copy",
        hint="Pick both by name and switch on trust_files, or put cond and uncond into the names "
        "of the files or of their folders.",
    )


def _nothing_found(
    level: str, catalogue: Catalogue, copy: str | None = None, *, one_branch: bool = False
) -> CheckpointError:
    there = sorted({c.header.level for c in catalogue.candidates}, key=_rank)
    wanted = "Ideogram 4 file" if level == AUTO else f"{level} file of Ideogram 4"
    files = files_of(None if level == AUTO else level, one_branch=one_branch)
    advice = f"{files} into {catalogue.listing.folder} and press R in ComfyUI."
    pick = level != AUTO and there
    hint = f"Pick one of: {', '.join(there)}. Or put {advice}" if pick else f"Put {advice}"
    return CheckpointError(
        f"there is no {wanted}{'' if copy is None else f' that holds the {copy} copy'}",
        found=", ".join(there) if there else "none",
        hint=" ".join((hint, *catalogue.broken.values())),
    )


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)
