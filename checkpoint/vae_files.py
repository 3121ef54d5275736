"""FLUX.2 VAE files, told by the names and shapes of their tensors.

The single file for ComfyUI has the original names and its statistics in the order (c, pi, pj).
Files with diffusers' names do not say their order: FLUX.2's pipeline has (c, pi, pj), Ideogram's
(pi, pj, c). The pocket model's, which was trained in Ideogram's, is told by its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError, NotIdeogram4Error
from .origins import what_it_is

NO_VAE = "this is not a FLUX.2 VAE"
_WHICH = "Ideogram 4 uses flux2-vae.safetensors."
STATISTICS = "bn.running_mean"
LATENT_CHANNELS = 32
PATCH = 2
_DIFFUSERS_BLOCK = "encoder.down_blocks.0.resnets.0.conv1.weight"
_POCKET_WIDTH = 32
Shapes = Mapping[str, Sequence[int]]


def first_block(level: int, block: int) -> str:
    """The first convolution of a residual block of the encoder, in the original names."""
    return f"encoder.down.{level}.block.{block}.conv1.weight"


def is_pocket_vae(shapes: Shapes) -> bool:
    """Whether it is the pocket model's VAE, as it lies in the pack."""
    return tuple(shapes.get(_DIFFUSERS_BLOCK, ()))[:1] == (_POCKET_WIDTH,)


def no_vae(names: Iterable[str], path: Path) -> NotIdeogram4Error:
    """The error for a file of another kind, or of another VAE."""
    names = list(names)
    kind = what_it_is(names) or f"{len(names)} other tensors"
    return NotIdeogram4Error(
        NO_VAE, file=path, found=kind, needed=f"a VAE with {STATISTICS}", hint=_WHICH
    )


def check_vae(shapes: Shapes, path: Path) -> None:
    """Nothing for a VAE that can be loaded; NotIdeogram4Error where it is none of FLUX.2, and
    CheckpointError where its names do not tell the order of its statistics."""
    needed = (LATENT_CHANNELS * PATCH**2,)
    found = shapes.get(STATISTICS)
    if found is None:
        raise no_vae(shapes, path)
    if tuple(found) != needed:
        raise NotIdeogram4Error(
            NO_VAE, file=path, tensor=STATISTICS, found=tuple(found), needed=needed, hint=_WHICH
        )
    if first_block(0, 0) not in shapes and not is_pocket_vae(shapes):
        raise CheckpointError(
            "this VAE is in diffusers' layout, which does not say how its statistics are ordered",
            file=path,
            tensor=first_block(0, 0),
            found="absent",
            hint="Use flux2-vae.safetensors, the single file for ComfyUI.",
        )
