"""Files in, `Models` out: which copy comes from which file, and whether the two belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Literal

import torch
from diffusers import Ideogram4Transformer2DModel

from ..checkpoint import Checkpoint, check_pair, open_checkpoint
from ..checkpoint.pairs import levels_of
from ..errors import CheckpointError, PairMismatchError
from ..ops.attention import SDPA
from ..ops.tuning.autotune import Measure
from .encoder import TextEncoder
from .generate import Models
from .linear import LinearOptions
from .one_copy import StandIn, unconditional_from
from .transformer import load_transformer
from .vae import Vae

PathArg = str | PathLike[str]
Copies = Literal["both", "conditional"]
COPIES = ("conditional", "unconditional")


def open_pair(
    model: PathArg,
    uncond: PathArg | None = None,
    *,
    base: PathArg | Sequence[PathArg] | None = None,
    copies: Copies = "both",
    one_branch: bool | None = None,
) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoints of the conditional and the unconditional copy; headers only.

    One file may hold both. Naming two files says which copy each is, where they do not say so
    themselves. ``copies="conditional"`` leaves the second out, and with it guidance. A one-branch
    model has no second copy; ``one_branch`` is the user's word for it. Raises PairMismatchError for
    two files that are no pair, CheckpointError where a copy is not given.
    """
    if copies == "conditional":
        return open_checkpoint(model, base, copy="conditional", one_branch=one_branch), None
    if uncond is None:
        both = open_checkpoint(model, base, one_branch=one_branch)
        if both.one_branch is not None:
            return both, None
        if both.copies != COPIES:
            raise CheckpointError(
                "guidance needs both copies, and this file holds one",
                file=model,
                found=f"{', '.join(both.copies)} ({both.copy_reason})",
                hint="Give the unconditional copy's file too (--uncond F; in compare "
                "--system NAME=COND,UNCOND), or an unconditional LoRA (--uncond-lora F). generate "
                "can leave guidance out with --copies conditional: the picture is worse without. A "
                "distilled model that needs no guidance: --branches one.",
            )
        return both, both
    first = open_checkpoint(model, base, copy="conditional", one_branch=one_branch)
    second = open_checkpoint(uncond, base, copy="unconditional", one_branch=one_branch)
    check_pair(first, second)
    return first, second


def preset_for(asked: str | None, checkpoint: Checkpoint) -> str:
    """The name of the preset to paint with: the one asked for, else that which a one-branch model's
    file tells, else the reference's default (whose guidance one branch leaves out)."""
    branch = checkpoint.one_branch
    return asked or (branch and branch.preset) or "default"


def pair_label(pair: tuple[Checkpoint, Checkpoint | None]) -> str:
    """The level of opened checkpoints; of two levels ``INT8 W8A8 rotated + Q4_K``, the conditional
    copy's first."""
    first, second = pair
    return " + ".join(levels_of(first.level, None if second is None else second.level))


def load_pair(
    pair: tuple[Checkpoint, Checkpoint | None],
    encoder: TextEncoder | None,
    vae: Vae | None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: LinearOptions | None = None,
    attention: str = SDPA,
    measure: Measure | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    stand_in: StandIn | None = None,
) -> Models:
    """`Models` from opened checkpoints; ``progress(copy, done, total)`` counts as loading does.

    stand_in: what runs the unconditional pass where the pair has no second copy, as in
    `one_copy.unconditional_from`. The rest is as in `transformer.load_transformer`.
    """

    def load(ck: Checkpoint, copy: str) -> Ideogram4Transformer2DModel:
        bar = None if progress is None else partial(progress, copy)
        return load_transformer(
            ck,
            copy,
            device=device,
            dtype=dtype,
            options=options,
            attention=attention,
            measure=measure,
            progress=bar,
        )

    first, second = pair
    conditional = load(first, "conditional")
    unconditional = None if second is None else load(second, "unconditional")
    if stand_in is not None:
        if second is not None:
            raise PairMismatchError(
                "an unconditional copy and a stand-in for it are given",
                file=second.paths[0],
                found=stand_in,
                needed="one of the two",
            )
        unconditional = unconditional_from(conditional, stand_in)
    return Models(conditional, unconditional, encoder, vae, first.one_branch is not None)
