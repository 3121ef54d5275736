"""The FLUX.2 VAE as the host's VAE, in any width.

The host takes the encoder's width for granted (128 channels, multiples 1, 2, 4, 4); a narrower
VAE, such as the pocket model's, is built from the shapes in its file.
"""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from torch import Tensor

from ..checkpoint.tensor_files import open_tensor_files
from ..checkpoint.vae_files import LATENT_CHANNELS, PATCH, check_vae, first_block, is_pocket_vae
from ..errors import CorruptFileError, NotIdeogram4Error
from ..pocket.comfy_vae import to_comfy

_HOST_WIDTHS = (128, 256, 512, 512)


def load_vae(path: Path) -> comfy.sd.VAE:
    """A FLUX.2 VAE file as the host's VAE; NotIdeogram4Error for other kinds of VAE.

    The pocket model's is also read as it lies in the pack, with diffusers' names.
    """
    files = open_tensor_files(path)
    if files.kind != "safetensors":
        raise NotIdeogram4Error("a VAE is read from safetensors files", file=path)
    state = files.load()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    check_vae(shapes, path)
    if is_pocket_vae(shapes):
        state = to_comfy(state)
    widths, blocks = _shape(state, path)
    if widths == _HOST_WIDTHS:
        vae = comfy.sd.VAE(sd=state, metadata=files.metadata)
        vae.throw_exception_if_invalid()
        return vae
    return _narrow_vae(state, widths, blocks)


def _shape(state: dict[str, Tensor], path: Path) -> tuple[tuple[int, ...], int]:
    """The encoder's channels at each resolution, and its residual blocks a resolution."""
    widths: list[int] = []
    while (weight := state.get(name := first_block(len(widths), 0))) is not None:
        if weight.ndim != 4 or not weight.numel():
            raise CorruptFileError(
                "this is no convolution", file=path, tensor=name, found=list(weight.shape)
            )
        widths.append(weight.shape[0])
    blocks = 0
    while first_block(0, blocks) in state:
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
