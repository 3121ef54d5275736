"""The low-rank updates of a model's linears as a small model for the host to manage.

The host's own linears hold the two halves, so the small model is loaded, loaded in part, streamed
and unloaded as any other, and its bytes are part of what the host asks room for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ..checkpoint.loras import LowRank, stack
from . import injected


class SidePath(nn.Module):
    """``up (down x)`` beside a linear: a forward hook of it that adds this to its output."""

    def __init__(self, update: LowRank, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.scale = 1.0
        self.tag = injected.tag(self)
        self.down = _linear(update.down, dtype)
        self.up = _linear(update.up, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in any float dtype -> [..., N] in the dtype of the updates."""
        return self.up(self.down(x.to(self.dtype)))

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """The linear's output [..., N] with ``scale`` times the update, in the output's dtype."""
        if self.scale == 0.0 or self.tag not in module.ideogram4_quant_side_paths:
            return output  # the tag: see injected.Modules.hook
        side = self(inputs[0])
        return output + (side if self.scale == 1.0 else side * self.scale).to(output.dtype)


class LowRankModel(nn.Module):
    """Updates by the canonical names of the linears that they are for.

    label: whose updates these are, for whoever holds several such models.
    """

    def __init__(
        self, updates: Mapping[str, LowRank], dtype: torch.dtype, label: Hashable | None = None
    ):
        super().__init__()
        self.label = label
        self.names = tuple(updates)
        self.paths = nn.ModuleList(SidePath(update, dtype) for update in updates.values())

    def side_paths(self) -> Iterator[tuple[str, SidePath]]:
        """(linear, path): the same paths each time, so that nothing is compiled again for them."""
        return zip(self.names, self.paths, strict=True)

    def set_scale(self, scale: float) -> None:
        """How strongly all of them act from now on; 1 at first, 0 not at all."""
        for path in self.paths:
            path.scale = scale


def load_low_rank(
    loaded: Sequence[tuple[Mapping[str, LowRank], float]],
    dtype: torch.dtype,
    load_device: torch.device,
    offload_device: torch.device,
    label: Hashable | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The updates, in ``dtype``, under a patcher of the host's; also how the host loads them again.

    loaded: (updates, strength) of each LoRA; those of one linear are stacked, so that two LoRAs
    cost one pair of products. label: as in LowRankModel. disable_dynamic: the host's wish
    for its older patcher.
    """
    updates = {
        name: stack([(found[name], strength) for found, strength in loaded if name in found])
        for name in dict.fromkeys(name for found, _ in loaded for name in found)
    }
    model = LowRankModel(updates, dtype, label).to(offload_device)
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    arguments = (loaded, dtype, load_device, offload_device, label)
    patcher.cached_patcher_init = (load_low_rank, arguments)
    return patcher


def unload_with(key: str) -> Callable[[comfy.model_patcher.ModelPatcher, bool], None]:
    """For ON_DETACH: where the host unloads a model, the updates beside it leave the device too."""

    def unload(patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
        if unpatch_all:
            for small in patcher.get_additional_models_with_key(key):
                small.detach()

    return unload


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    n, k = weight.shape
    linear = comfy.ops.manual_cast.Linear(k, n, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return linear
