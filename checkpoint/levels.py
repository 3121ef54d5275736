"""Which files a quantization level stands for on this machine, and what ``auto`` means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, NotIdeogram4Error, PairMismatchError
from .branches import OneBranch
from .checkpoints import Checkpoint, check_pair
from .copies import without_copy_words
from .level_order import AUTO, LEVELS
from .listing import Listing
from .published import files_of

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

    One branch (``one_branch`` says why) has no other copy and lacks none.
    """

    level: str
    conditional: Candidate
    unconditional: Candidate | None
    notes: tuple[str, ...] = ()

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
) -> Pair:
    """The files of `level`; for ``auto`` the first level of `order` that is there and fits.

    memory: bytes of the device. Fits, from best to worst: both copies and the working memory, one
    copy and the working memory, neither (then the smallest). auto passes over files of linears only
    unless there is a base for them, over one branch where there are both copies of a level, and
    over a conditional copy alone, which has no guidance, unless there is nothing else; files that
    cannot be read are in the pair's notes, with the reason. one_copy: the conditional copy alone is
    wanted, and is all that has to fit. CheckpointError says what is missing, PairMismatchError that
    the files do not say which copies they are.
    """
    if level != AUTO:
        pair = find_pair(level, catalogue.candidates)
        if pair is None:
            raise _nothing_found(level, catalogue)
        return _wanted(_sure(pair, catalogue.candidates), one_copy)
    usable = [c for c in catalogue.candidates if with_base or not c.header.linears_only]
    pairs = [pair for pair in (find_pair(name, usable) for name in order) if pair is not None]
    if not pairs:
        raise _nothing_found(level, catalogue)
    if one_copy:
        pairs = [pair for pair in pairs if pair.one_branch is None] or pairs
    both = [pair for pair in pairs if pair.unconditional is not None]
    complete = both or [pair for pair in pairs if pair.complete]
    if not complete and not one_copy:  # a level further down may be a whole model that says nothing
        pairs = [_sure(pair, usable) for pair in pairs]
    fitting = _fitting(pairs if one_copy else complete or pairs, memory, one_copy)
    pair = _wanted(_sure(fitting, usable), one_copy)
    unread = tuple(f"passed over, {problem}" for problem in catalogue.broken.values())
    return replace(pair, notes=(*pair.notes, *unread))


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


def _nothing_found(level: str, catalogue: Catalogue) -> CheckpointError:
    there = sorted({c.header.level for c in catalogue.candidates}, key=_rank)
    wanted = "Ideogram 4 file" if level == AUTO else f"{level} file of Ideogram 4"
    files = files_of(None if level == AUTO else level)
    advice = f"{files} into {catalogue.listing.folder} and press R."
    pick = level != AUTO and there
    hint = f"Pick one of: {', '.join(there)}. Or put {advice}" if pick else f"Put {advice}"
    return CheckpointError(
        f"there is no {wanted}",
        found=", ".join(there) if there else "none",
        hint=" ".join((hint, *catalogue.broken.values())),
    )


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)
