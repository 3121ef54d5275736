"""The FLUX.2 VAE: tokens to pictures and back, from diffusers' folder or ComfyUI's single file."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor

from ..checkpoint.tensor_files import open_tensor_files, read_json
from ..checkpoint.vae_files import no_vae
from ..errors import CheckpointError, CorruptFileError
from .latents import PATCH, pack, to_token_order, unpack
from .linear import default_device, default_dtype

_log = logging.getLogger(__name__)

Order = Literal["(pi, pj, c)", "(c, pi, pj)"]
_TOKEN_ORDER, _FLUX2_ORDER = "(pi, pj, c)", "(c, pi, pj)"
# The 4 positions of a channel have nearly equal statistics, different channels have not: the order
# under which the groups of 4 agree this many times better is the file's.
_CLEARLY = 4.0
_MAX_LAYERS, _MAX_LEVELS, _MAX_SIZE = 64, 16, 1 << 16  # what a config may ask for

# FLUX.2's and ComfyUI's names -> diffusers'. Decoder levels count the other way round there.
_RENAMES = [
    (re.compile(r"^encoder\.(quant_conv\.)"), r"\1"),
    (re.compile(r"^decoder\.(post_quant_conv\.)"), r"\1"),
    (re.compile(r"^encoder\.down\.(\d+)\.block\.(\d+)\."), r"encoder.down_blocks.\1.resnets.\2."),
    (re.compile(r"^encoder\.down\.(\d+)\.downsample\."), r"encoder.down_blocks.\1.downsamplers.0."),
    (re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\."), r"decoder.up_blocks.-\1.resnets.\2."),
    (re.compile(r"^decoder\.up\.(\d+)\.upsample\."), r"decoder.up_blocks.-\1.upsamplers.0."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
]


class Vae:
    """Normalised tokens [B, rows * columns, 128] <-> pictures of 16 px a token."""

    def __init__(self, model: AutoencoderKLFlux2, mean: Tensor, std: Tensor, order: Order) -> None:
        self.model = model
        self.mean = mean  # [128], fp32, in token order
        self.std = std
        self.order = order  # of the file's statistics

    @torch.no_grad()
    def decode(self, tokens: Tensor, rows: int, columns: int) -> list[Image.Image]:
        """The pictures of final latents; 8 bits a channel, rounded as diffusers rounds."""
        weight = self.model.post_quant_conv.weight
        raw = unpack(tokens.to(self.mean) * self.std + self.mean, rows, columns)
        decoded = self.model.decode(raw.to(weight), return_dict=False)[0]
        unit = (decoded.float() * 0.5 + 0.5).clamp(0.0, 1.0)
        pixels = (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p) for p in pixels]

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """Normalised tokens [1, rows * columns, 128] of a picture: the posterior's mean."""
        weight = self.model.quant_conv.weight
        pixels = np.array(image.convert("RGB"), dtype=np.float32)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(weight) / 127.5 - 1.0
        posterior = self.model.encode(x, return_dict=False)[0]
        return (pack(posterior.mode().float()) - self.mean) / self.std


def load_vae(
    path: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Vae:
    """The VAE in a diffusers folder (or a pipeline's folder with ``vae/``) or a single file.

    The `bn` statistics lie in the order (pi, pj, c) in Ideogram's diffusers folders and (c, pi, pj)
    in FLUX.2's and ComfyUI's files; where their values say otherwise, the values are believed.
    """
    device = default_device(device)
    dtype = default_dtype(device, dtype)
    weights, config = _locate(Path(path))
    state = open_tensor_files(weights).load()
    foreign = any(name.startswith(("encoder.down.", "decoder.up.")) for name in state)
    if foreign:
        state = _to_diffusers(state)
    if "bn.running_mean" not in state or "decoder.conv_in.weight" not in state:
        raise no_vae(state, weights)
    model = _build(state, config or _config_from_shapes(state, weights), weights, device, dtype)
    mean = state["bn.running_mean"].to(device, torch.float32)
    var = state["bn.running_var"].to(device, torch.float32)
    order = _statistics_order(mean, var, _FLUX2_ORDER if foreign else _TOKEN_ORDER, weights)
    if order == _FLUX2_ORDER:
        mean, var = to_token_order(mean), to_token_order(var)
    return Vae(model, mean, (var + model.config.batch_norm_eps).sqrt(), order)


def _locate(path: Path) -> tuple[Path, dict | None]:
    """The weights' file and, in a folder, the config."""
    if not path.exists():
        raise CheckpointError("no such file or folder", file=path)
    if path.is_file():
        return path, None
    if not (path / "config.json").is_file() and (path / "vae").is_dir():
        path = path / "vae"
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or len(files) != 1:
        raise CheckpointError(
            "not a VAE folder",
            file=path,
            found=f"{len(files)} safetensors files",
            needed="config.json and one safetensors file",
        )
    known = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    config = {k: v for k, v in read_json(path / "config.json").items() if k in known}
    for key, value in config.items():
        if not _is_usable(value, _MAX_LAYERS if key == "layers_per_block" else _MAX_SIZE):
            raise CorruptFileError(
                f"unusable {key} in the VAE's config",
                file=path / "config.json",
                found=repr(value)[:80],
            )
    return files[0], config


def _is_usable(value: object, largest: int) -> bool:
    """Sizes up to ``largest``, texts, short lists of these: nothing that would build forever."""
    if isinstance(value, list):
        return len(value) <= _MAX_LEVELS and all(_is_usable(item, largest) for item in value)
    number = isinstance(value, int | float)
    return value is None or isinstance(value, str) or (number and 0 <= value <= largest)


def _to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(
        (int(m[1]) for name in state if (m := re.match(r"decoder\.up\.(\d{1,4})\.", name))),
        default=0,
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        name = re.sub(
            r"up_blocks\.-(\d{1,4})", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name
        )
        # 1 x 1 convolutions there, linears here.
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        renamed[name] = tensor
    return renamed


def _config_from_shapes(state: Mapping[str, Tensor], file: Path) -> dict:
    def shape(name: str) -> torch.Size:
        if state[name].ndim != 4:
            raise CorruptFileError(
                "this is no convolution", file=file, tensor=name, found=list(state[name].shape)
            )
        return state[name].shape

    def widths(side: str) -> tuple[int, ...]:
        name = f"{side}.{{}}.resnets.0.conv1.weight"
        found = []
        while name.format(len(found)) in state:
            found.append(shape(name.format(len(found)))[0])
        return tuple(found)

    encoder, decoder = widths("encoder.down_blocks"), widths("decoder.up_blocks")[::-1]
    layers = sum(
        re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name) is not None
        for name in state
    )
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(encoder),
        "up_block_types": ("UpDecoderBlock2D",) * len(decoder),
        "block_out_channels": encoder,
        "decoder_block_out_channels": decoder,
        "layers_per_block": layers,
        "latent_channels": shape("decoder.conv_in.weight")[1],
    }


def _build(
    state: dict[str, Tensor], config: dict, file: Path, device: torch.device, dtype: torch.dtype
) -> AutoencoderKLFlux2:
    try:
        with torch.device("meta"):
            model = AutoencoderKLFlux2(**config)
    except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        raise CorruptFileError(
            f"no VAE can be made of its configuration: {error}", file=file
        ) from error
    wanted = model.state_dict()
    wanted.pop("bn.num_batches_tracked")
    for name, empty in wanted.items():
        if name not in state or state[name].shape != empty.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise CheckpointError(
                "the VAE does not fit its configuration",
                file=file,
                tensor=name,
                found=found,
                needed=list(empty.shape),
            )
    model.bn.num_batches_tracked = torch.zeros((), dtype=torch.long)
    placed = {name: state[name].to(device, dtype) for name in wanted}
    model.load_state_dict(placed, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def _statistics_order(mean: Tensor, var: Tensor, usual: Order, file: Path) -> Order:
    """The order of the `bn` statistics: the format's usual one unless the values contradict."""
    std = var.clamp_min(1e-12).sqrt()
    values = torch.stack([mean / std.mean(), std.log()])  # [2, 4 * C]
    patch = PATCH * PATCH
    spread = {
        _TOKEN_ORDER: values.reshape(2, patch, -1).var(dim=1).mean().item(),
        _FLUX2_ORDER: values.reshape(2, -1, patch).var(dim=2).mean().item(),
    }
    other = _FLUX2_ORDER if usual == _TOKEN_ORDER else _TOKEN_ORDER
    if spread[usual] <= _CLEARLY * spread[other]:
        return usual
    _log.warning(
        "%s: the bn statistics lie in the order %s, not in %s as usual for such files",
        file,
        other,
        usual,
    )
    return other
