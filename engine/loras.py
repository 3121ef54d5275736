"""LoRAs on the engine's models as low-rank products beside their linears."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.copies import COPIES
from ..checkpoint.loras import (
    LoraFile,
    LowRank,
    describe,
    parse_lora,
    read_lora,
    read_strength,
    refuse_changes,
)
from ..errors import ArgumentTypeError, CheckpointError
from .transformer import canonical_name, compute_dtype

APPLY_TO = ("as in the file", *COPIES, "both")
_UPDATES = "ideogram4_quant_loras"


class SidePath(nn.Module):
    """``y + up (down x)``, as a child of the linear that it is beside, so that it moves with it."""

    def __init__(self, update: LowRank, strength: float, like: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("down", update.down.to(like.device, dtype), persistent=False)
        self.register_buffer("up", (update.up * strength).to(like.device, dtype), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., K] and the linear's y [..., N] -> [..., N] in y's dtype."""
        return y + (x.to(self.down.dtype) @ self.down.T @ self.up.T).to(y.dtype)


def read(path: Path, model: nn.Module) -> LoraFile:
    """A file of LoRAs for models of this one's sizes.

    CheckpointError and its kinds for one that does not fit or is of a kind that changes the weights
    themselves (DoRA, OFT, diffs), which only the ComfyUI node applies.
    """
    linears = _linears(model)
    shapes = {name: (one.out_features, one.in_features) for name, one in linears.items()}
    known = {f"{name}.weight" for name in linears}
    named = {canonical_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    others = {name: shape for name, shape in named.items() if name not in known}
    found = parse_lora(read_lora(path), shapes, path.name, read_strength(path), others)
    hint = "Use the node Load LoRA for Ideogram 4 in ComfyUI."
    refuse_changes(found, path.name, "which is possible in ComfyUI alone", hint)
    return found


def add(
    models: Mapping[str, nn.Module | None], path: Path, strength: float, apply_to: str
) -> list[str]:
    """Loads a file onto the copies that it is for, on top of what they have; what was understood.

    models: by copy; None where there is none. ArgumentTypeError for another ``apply_to`` than one
    of APPLY_TO; CheckpointError as `read`, and where the file is for a copy that is not there.
    """
    if apply_to not in APPLY_TO:
        raise ArgumentTypeError(
            "apply_to is none of its values", found=apply_to, needed=", ".join(APPLY_TO)
        )
    there = {copy: model for copy, model in models.items() if model is not None}
    found = read(path, next(iter(there.values())))
    updates = {copy: found.for_copy(copy, apply_to) for copy in there}
    if not any(updates.values()):
        raise CheckpointError(
            "this LoRA changes none of the copies that are loaded",
            file=path.name,
            found=describe(found),
            hint="Pass apply_to='both', or load the other copy too.",
        )
    for copy, model in there.items():
        linears = _linears(model)
        for name, update in updates[copy].items():
            _add(linears[name], update, strength, compute_dtype(model))
    return describe(found, apply_to).splitlines()


def remove(model: nn.Module | None) -> None:
    """Takes every LoRA off a model, which is then as it was."""
    for module in [] if model is None else list(_linears(model).values()):
        if hasattr(module, _UPDATES):
            vars(module).pop(f"{_UPDATES}_hook").remove()
            delattr(module, _UPDATES)


def has_loras(model: nn.Module | None) -> bool:
    """Whether any linear of a model has a LoRA beside it."""
    return model is not None and any(hasattr(m, _UPDATES) for m in model.modules())


def _add(linear: nn.Module, update: LowRank, strength: float, dtype: torch.dtype) -> None:
    if not hasattr(linear, _UPDATES):
        linear.add_module(_UPDATES, nn.ModuleList())
        vars(linear)[f"{_UPDATES}_hook"] = linear.register_forward_hook(_beside)
    getattr(linear, _UPDATES).append(SidePath(update, strength, linear.weight, dtype))


def _beside(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for path in getattr(linear, _UPDATES):
        output = path(inputs[0], output)
    return output


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of a model by canonical name."""
    return {
        canonical_name(f"{name}.").removesuffix("."): module
        for name, module in model.named_modules()
        if hasattr(module, "out_features") and hasattr(module, "in_features")
    }
