"""Which files the inputs of the model loader stand for, on the device that the host computes on."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_management as management
import torch

from ..checkpoint import check_pair
from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.level_order import AUTO, AUTO_ORDER, SAME, capability
from ..checkpoint.levels import Catalogue, check_level, read_catalogue, resolve
from ..checkpoint.listing import Listing
from ..checkpoint.pairs import Candidate, Pair, partner_of
from ..errors import PairMismatchError
from ..ops import dispatch
from ..ops.attention import reports as attention_reports
from .headers import open_header
from .model_files import known_listing, listing_around
from .model_loading import compute_dtype
from .report import Machine

logger = logging.getLogger(__name__)
BRANCHES = {AUTO: None, "one": True, "two": False}
BY_LEVEL = "by level"
NONE = "none"
FOLDERS = "diffusion_models"


def choose_files(
    level: str,
    conditional_file: str = BY_LEVEL,
    unconditional_file: str = BY_LEVEL,
    base_file: str = NONE,
    trust_files: bool = False,
    branches: str = AUTO,
    unconditional_level: str = SAME,
    one_copy: bool = False,
    alone: bool = False,
) -> tuple[Pair, tuple[Path, ...]]:
    """The files to load and those of the base; CheckpointError and its kinds say what is wrong.

    A file picked by name goes before the level, and the other copy is then looked for at the level
    of that file. With the level ``auto`` a picked file that is not here is passed over, which the
    pair's notes and the log say: so a workflow names what to download, and runs with other files.
    trust_files: a picked file is the copy it was picked for, whatever its name says.
    branches: one of `BRANCHES`: files are of one branch, or a pair's copies, whatever they say.
    unconditional_level: of that copy, where it is not that of the conditional one; a file picked by
    name goes before it. one_copy: the conditional copy alone, which runs both passes. alone:
    nothing asks for the unconditional copy, so that only the conditional one has to fit.
    """
    check_level(unconditional_level, SAME)
    if one_copy and unconditional_level != SAME:
        raise PairMismatchError(
            "an unconditional level and an unconditional LoRA are picked, and each stands for the "
            "unconditional copy",
            found=unconditional_level,
            hint=f"Set unconditional_level to {SAME!r}, or unconditional_lora to 'none'.",
        )
    if BRANCHES[branches] and unconditional_level != SAME:
        raise PairMismatchError(
            "a model of one branch has no unconditional copy",
            found=f"unconditional_level {unconditional_level}",
            hint=f"Set unconditional_level to {SAME!r}, or branches to 'auto' or 'two'.",
        )
    if alone and not one_copy:
        unconditional_file, unconditional_level = BY_LEVEL, SAME
    single = one_copy or alone
    listing = known_listing(FOLDERS)
    absent = missing_picks(level, listing, conditional_file, unconditional_file)
    if conditional_file in absent:
        conditional_file = unconditional_file = BY_LEVEL
    elif unconditional_file in absent:
        unconditional_file = BY_LEVEL
    # a file by name goes before it, so that only the conditional copy is looked for by level
    beside = SAME if unconditional_file != BY_LEVEL else unconditional_level
    word = BRANCHES[branches]
    catalogue = _catalogue(listing_around(FOLDERS, conditional_file), level, word)
    bases = _bases(base_file, catalogue)

    def picked(name: str, copy: str) -> Candidate:
        path = listing.path(name)
        told = copy if trust_files else None
        header = open_header(path, bases, copy=told, one_branch=word)
        if copy not in header.copies:
            raise PairMismatchError(
                f"picked as the {copy} copy, but it is the other one",
                file=name,
                found=f"{', '.join(header.copies)} ({header.copy_reason})",
                needed=copy,
                hint="Pick the other file, or switch on trust_files if you know better.",
            )
        return Candidate(name, path, header)

    if conditional_file == BY_LEVEL:
        here = machine()
        how = {"with_base": bool(bases), "one_copy": single, "one_branch": bool(word)}
        pair = resolve(level, catalogue, _order(here), here.memory, unconditional=beside, **how)
    else:
        first = picked(conditional_file, CONDITIONAL)
        second = None if single else _beside(first, beside, catalogue)
        pair = Pair(first.header.level, first, second)
    if one_copy and pair.one_branch is not None:
        raise PairMismatchError(
            "this model needs no guidance, so an unconditional LoRA has nothing to stand for",
            file=pair.conditional.name,
            hint="Set unconditional_lora to 'none', or pick another file.",
        )
    if unconditional_file != BY_LEVEL:
        if one_copy:
            raise PairMismatchError(
                "an unconditional file and an unconditional LoRA are picked, and each stands for "
                "the unconditional copy",
                file=unconditional_file,
                hint="Set unconditional_file to 'by level', or unconditional_lora to 'none'.",
            )
        pair = replace(pair, unconditional=picked(unconditional_file, UNCONDITIONAL))
    if pair.unconditional is not None:
        check_pair(pair.conditional.header, pair.unconditional.header)
    if absent:
        note = f"not here: {', '.join(absent)}; level {AUTO} took {pair.conditional.name} instead"
        if conditional_file != BY_LEVEL:
            note = f"not here: {', '.join(absent)}; looked for the copy by the level of the other"
        logger.warning("%s", note)
        pair = replace(pair, notes=(*pair.notes, note))
    return pair, bases


def missing_picks(level: str, listing: Listing, *names: str) -> list[str]:
    """Files picked by name that are not here, and that the level ``auto`` passes over."""
    if level != AUTO:
        return []
    return [name for name in names if name != BY_LEVEL and name not in listing.paths]


def _beside(first: Candidate, level: str, catalogue: Catalogue) -> Candidate | None:
    """The other copy of a file picked by name: of its level, or of one that was asked for.

    CheckpointError where one was asked for and is not there.
    """
    asked = level not in (SAME, first.header.level)
    if not asked and UNCONDITIONAL in first.header.copies:
        return first
    if first.header.one_branch is not None and not asked:
        return None
    wanted = level if asked else first.header.level
    peers = [c for c in catalogue.candidates if c.header.level == wanted]
    found = partner_of(first, peers)
    if found is None and asked:
        raise PairMismatchError(
            f"no unconditional copy of {level} goes with this file",
            file=first.name,
            found=", ".join(c.name for c in peers) or "no file of that level",
            hint=f"Set unconditional_level to {SAME!r}, or pick the unconditional_file by name.",
        )
    return found


def _catalogue(listing: Listing, level: str, word: bool | None) -> Catalogue:
    """The files there are, seen as the user's word for one branch wants them.

    Where one branch is asked for and files of the level say that they are it, the others are left
    out; where none says so, every conditional copy is taken as one.
    """
    seen = read_catalogue(
        listing, partial(open_header, one_branch=False if word is False else None)
    )
    if not word:
        return seen
    told = [c for c in seen.candidates if c.header.one_branch is not None]
    if any(level in (AUTO, c.header.level) for c in told):
        return replace(seen, candidates=told)
    return read_catalogue(listing, partial(open_header, one_branch=True))


def _bases(name: str, catalogue: Catalogue) -> tuple[Path, ...]:
    """The base file, and the file of the other copy that goes with it."""
    if name == NONE:
        return ()
    path = catalogue.listing.path(name)
    chosen = Candidate(name, path, open_header(path))
    if len(chosen.header.copies) > 1:
        return (path,)
    peers = [c for c in catalogue.candidates if c.header.level == chosen.header.level]
    if UNCONDITIONAL in chosen.header.copies:
        others = [c for c in peers if partner_of(c, [chosen]) is chosen]
        return (path, *(c.path for c in others[:1]))
    other = partner_of(chosen, peers)
    return (path,) if other is None else (path, other.path)


def machine() -> Machine:
    """The device that the host computes on."""
    device = management.get_torch_device()
    return Machine(
        device=management.get_torch_device_name(device),
        memory=management.get_total_memory(device),
        free=int(management.get_free_memory(device)),
        ram_free=int(management.get_free_memory(torch.device("cpu"))),
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        backends=dispatch.reports(device),
        attention_backends=attention_reports(device),
    )


def _order(here: Machine) -> tuple[str, ...]:
    int8 = any(b.available and b.name != "reference" for b in here.backends)
    fp4 = management.supports_nvfp4_compute(management.get_torch_device())
    return AUTO_ORDER[capability(int8, here.dtype == "bfloat16", fp4)]
