"""The VAE as ComfyUI wants it: the original FLUX.2 names, `bn` in the order (c, pi, pj).

diffusers' Ideogram pipeline reads the same statistics in the order (pi, pj, c); a file serves one
of the two.
"""

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .paths import WEIGHTS, vae_dir

DDCONFIG = {
    "double_z": True,
    "z_channels": 32,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
    "batch_norm_latent": True,
}
_LAST_UP = len(DDCONFIG["ch_mult"]) - 1
_RENAMES = [
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
]


def _up(name: str) -> str:
    """decoder.up_blocks.i is up.(3 - i) in the original."""
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)(.*)", name)
    if not found:
        return name
    level, part, rest = found.groups()
    part = "block" if part == "resnets" else "upsample"
    return f"decoder.up.{_LAST_UP - int(level)}.{part}{rest}"


def comfy_name(name: str) -> str:
    """One tensor's name in the original file."""
    name = _up(name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_comfy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' VAE state dict -> ComfyUI's: names, 1 x 1 convolutions, `bn` order."""
    out = {}
    for name, tensor in state.items():
        new = comfy_name(name)
        if ".attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if name in ("bn.running_mean", "bn.running_var"):
            tensor = tensor.reshape(4, 32).T.flatten()  # (pi pj, c) -> (c, pi pj)
        out[new] = tensor.contiguous()
    return out


def comfy_vae_state_dict(root: Path = WEIGHTS) -> dict[str, Tensor]:
    """The committed VAE for ComfyUI's `AutoencoderKL(ddconfig=DDCONFIG, embed_dim=32)`."""
    return to_comfy(load_file(vae_dir(root) / "diffusion_pytorch_model.safetensors"))


def write_comfy_vae(path: Path, root: Path = WEIGHTS) -> None:
    """Writes the committed VAE as one file in the manner of `flux2-vae.safetensors`."""
    save_file(comfy_vae_state_dict(root), path, {"format": "pt"})
