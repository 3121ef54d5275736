"""The FLUX.2 VAE as the host's VAE, in any width.

The host takes the encoder's width for granted (128 channels, multiples 1, 2, 4, 4); a narrower
VAE, such as the pocket model's, is built from the shapes in its file.
"""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from torch import Tensor

from ..checkpoint.tensor_files import open_tensor_files
from ..errors import CorruptFileError, NotIdeogram4Error

LATENT_CHANNELS = 32
PATCH = 2
_HOST_WIDTHS = (128, 256, 512, 512)


def load_vae(path: Path) -> comfy.sd.VAE:
    """A FLUX.2 VAE file as the host's VAE; NotIdeogram4Error for other kinds of VAE."""
    files = open_tensor_files(path)
    if files.kind != "safetensors":
        raise NotIdeogram4Error("a VAE is read from safetensors files", file=path)
    state = files.load()
    _check(state, path)
    widths, blocks = _shape(state, path)
    if widths == _HOST_WIDTHS:
        vae = comfy.sd.VAE(sd=state, metadata=files.metadata)
        vae.throw_exception_if_invalid()
        return vae
    return _narrow_vae(state, widths, blocks)


def _check(state: dict[str, Tensor], path: Path) -> None:
    statistics = state.get("bn.running_mean")
    if statistics is None or tuple(statistics.shape) != (LATENT_CHANNELS * PATCH**2,):
        raise NotIdeogram4Error(
            "this is not a FLUX.2 VAE",
            file=path,
            tensor="bn.running_mean",
            found="absent" if statistics is None else tuple(statistics.shape),
            needed=(LATENT_CHANNELS * PATCH**2,),
            hint="Ideogram 4 uses flux2-vae.safetensors.",
        )
    if _first_block(0, 0) not in state:
        # diffusers-named files come with the statistics in either of two orders
        raise NotIdeogram4Error(
            "this VAE is in diffusers' layout, which does not say how its statistics are ordered",
            file=path,
            tensor=_first_block(0, 0),
            found="absent",
            hint="Use flux2-vae.safetensors, the single file for ComfyUI.",
        )


def _first_block(level: int, block: int) -> str:
    return f"encoder.down.{level}.block.{block}.conv1.weight"


def _shape(state: dict[str, Tensor], path: Path) -> tuple[tuple[int, ...], int]:
    """The encoder's channels at each resolution, and its residual blocks a resolution."""
    widths: list[int] = []
    while (weight := state.get(name := _first_block(len(widths), 0))) is not None:
        if weight.ndim != 4 or not weight.numel():
            raise CorruptFileError(
                "this is no convolution", file=path, tensor=name, found=list(weight.shape)
            )
        widths.append(weight.shape[0])
    blocks = 0
    while _first_block(0, blocks) in state:
        blocks += 1
    return tuple(widths), blocks


def _narrow_vae(state: dict[str, Tensor], widths: tuple[int, ...], blocks: int) -> comfy.sd.VAE:
    settings = {
        "double_z": True,
        "z_channels": LATENT_CHANNELS,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [w // widths[0] for w in widths],
        "num_res_blocks": blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    vae = comfy.sd.VAE(
        sd=state, config={"params": {"ddconfig": settings, "embed_dim": LATENT_CHANNELS}}
    )
    # what the host derives from the file where it builds the model itself
    vae.latent_channels = LATENT_CHANNELS * PATCH**2
    vae.downscale_ratio *= PATCH
    vae.upscale_ratio *= PATCH
    plain_memory = vae.memory_used_decode
    vae.memory_used_decode = lambda shape, dtype: plain_memory(shape, dtype) * PATCH**2
    return vae
