"""Files in, `Models` out: which copy comes from which file, and whether the two belong together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Literal

import torch
from diffusers import Ideogram4Transformer2DModel

from ..checkpoint import Checkpoint, open_checkpoint
from ..ops.errors import CheckpointError, PairMismatchError
from .encoder import TextEncoder
from .generate import Models
from .linear import LinearOptions
from .transformer import load_transformer
from .vae import Vae

PathArg = str | PathLike[str]
Copies = Literal["both", "conditional"]


def open_pair(
    model: PathArg,
    uncond: PathArg | None = None,
    *,
    base: PathArg | None = None,
    copies: Copies = "both",
) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoints of the conditional and the unconditional copy; headers only.

    One file may hold both. ``copies="conditional"`` leaves the second out, and with it guidance.
    Raises PairMismatchError for two files that are no pair, CheckpointError where a copy is not
    given.
    """
    first = open_checkpoint(model, base)
    if "conditional" not in first.copies:
        raise PairMismatchError(
            "this is not the conditional copy",
            file=model,
            found=f"{', '.join(first.copies)} ({first.copy_reason})",
            needed="conditional",
            hint="Give the conditional copy as the model, the other as the unconditional one.",
        )
    if copies == "conditional":
        return first, None
    if uncond is None:
        if "unconditional" not in first.copies:
            raise CheckpointError(
                "guidance needs the unconditional copy, and this file holds one copy",
                file=model,
                found=f"{', '.join(first.copies)} ({first.copy_reason})",
                hint="Give its file (--uncond F), or leave guidance out (--copies conditional): "
                "the picture is worse without.",
            )
        return first, first
    second = open_checkpoint(uncond, base)
    if "unconditional" not in second.copies:
        raise PairMismatchError(
            "this is not the unconditional copy",
            file=uncond,
            found=f"{', '.join(second.copies)} ({second.copy_reason})",
            needed="unconditional",
            hint="Give the unconditional copy of the same release.",
        )
    if first.config != second.config:
        raise PairMismatchError(
            f"the two copies differ in size from {model}",
            file=uncond,
            found=second.config,
            needed=first.config,
        )
    return first, second


def load_pair(
    pair: tuple[Checkpoint, Checkpoint | None],
    encoder: TextEncoder | None,
    vae: Vae,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: LinearOptions | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Models:
    """`Models` from opened checkpoints; ``progress(copy, done, total)`` counts as loading does."""

    def load(ck: Checkpoint, copy: str) -> Ideogram4Transformer2DModel:
        bar = None if progress is None else partial(progress, copy)
        return load_transformer(ck, copy, device=device, dtype=dtype, options=options, progress=bar)

    first, second = pair
    unconditional = None if second is None else load(second, "unconditional")
    return Models(load(first, "conditional"), unconditional, encoder, vae)
