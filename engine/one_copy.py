"""Guidance from one resident copy: what the conditional copy's own weights run in the second pass.

``self``: the conditional copy on image tokens without text. A LoRA: the conditional copy with it
beside its linears, ``y = W x + up (down x)``, in the unconditional pass alone. Either way the
weights are in memory once.
"""

from __future__ import annotations

import copy
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint.tensor_files import open_tensor_files
from ..errors import CheckpointError, CorruptFileError
from .linear import QuantLinear
from .transformer import PackTransformer, canonical_name, compute_dtype

SELF: Literal["self"] = "self"
StandIn = Literal["self"] | Path
_PREFIX = "diffusion_model."
_HALVES = ("lora_A.weight", "lora_B.weight")


class SidePathLinear(QuantLinear):
    """``W x + b + up (down x)``; W is another module's own tensor, down [r, K] and up [N, r]."""

    def __init__(self, linear: QuantLinear, down: Tensor, up: Tensor) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.options = linear.weight, linear.bias, linear.options
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (x.to(self.down) @ self.down.t() @ self.up.t()).to(y.dtype)


def unconditional_from(model: PackTransformer, stand_in: StandIn) -> PackTransformer:
    """What runs the unconditional pass on the tensors of ``model``, the conditional copy.

    stand_in: ``"self"``, or the file of an unconditional LoRA in ai-toolkit's names. Raises
    CheckpointError and its kinds for a file that is none, or of another model.
    """
    if stand_in == SELF:
        return model
    weight = model.embed_image_indicator.weight
    pairs = read_pairs(stand_in, _linears(model))
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, tensors)  # the modules twice, the tensors once
    for place, (down, up) in pairs.items():
        halves = (half.to(weight.device, compute_dtype(model)) for half in (down, up))
        other.set_submodule(place, SidePathLinear(other.get_submodule(place), *halves))
    return other.eval()


def _linears(model: PackTransformer) -> dict[str, tuple[str, tuple[int, int]]]:
    """Canonical name of every linear -> (its name in the engine, (N, K))."""
    return {
        canonical_name(f"{name}.weight").removesuffix(".weight"): (name, tuple(m.weight.shape))
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }


def read_pairs(
    path: str | PathLike[str], linears: dict[str, tuple[str, tuple[int, int]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) of each linear by the engine's name, fp32; up carries alpha / rank.

    Only plain LoRAs in ai-toolkit's names, which ostris' unconditional LoRA and
    ``ideogram4-quant delta`` have; ComfyUI's nodes read the other kinds.
    """
    files = open_tensor_files(path)
    if files.kind != "safetensors" or not any(key.endswith(_HALVES) for key in files.tensors):
        raise _refused("this file holds no LoRA for Ideogram 4", path, files.kind)
    state = files.load()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    used = set()
    for name, (place, shape) in linears.items():
        keys = [f"{_PREFIX}{name}.{half}" for half in _HALVES]
        there = [key in state for key in keys]
        if not any(there):
            continue
        if not all(there):
            raise CorruptFileError(
                "one half of a LoRA pair is missing", file=path, tensor=keys[there.index(False)]
            )
        used |= {*keys, f"{_PREFIX}{name}.alpha"}
        found[place] = _pair(state, keys, shape, state.get(f"{_PREFIX}{name}.alpha"), path)
    left = sorted(state.keys() - used)
    if left:
        raise _refused("a tensor of this LoRA is not understood here", path, None, left[0])
    return found


def _pair(
    state: dict[str, Tensor],
    keys: list[str],
    shape: tuple[int, int],
    alpha: Tensor | None,
    path: str | PathLike[str],
) -> tuple[Tensor, Tensor]:
    down, up = (state[key].float() for key in keys)
    rank = down.shape[0] if down.ndim == 2 else 0
    for key, half, needed in (
        (keys[0], down, (rank, shape[1])),
        (keys[1], up, (shape[0], rank)),
    ):
        if rank == 0 or tuple(half.shape) != needed:
            raise CorruptFileError(
                "the LoRA does not fit this model",
                file=path,
                tensor=key,
                found=list(half.shape),
                needed=list(needed),
                hint="It was made for a model of another size.",
            )
    scale = 1.0 if alpha is None else float(alpha) / rank
    if not torch.isfinite(torch.tensor(scale)):
        raise CorruptFileError("its alpha is no number", file=path, tensor=keys[0], found=scale)
    return down, up * scale


def _refused(
    what: str, path: str | PathLike[str], found: object, tensor: str | None = None
) -> CheckpointError:
    return CheckpointError(
        what,
        file=path,
        tensor=tensor,
        found=found,
        needed="pairs of diffusion_model.NAME.lora_A.weight and ...lora_B.weight",
        hint="Load LoRA for Ideogram 4 in ComfyUI reads LoRAs of every naming.",
    )
