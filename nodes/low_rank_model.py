"""The low-rank updates of a model's linears as a small model for the host to manage.

The host's own linears hold the two halves, so the small model is loaded, loaded in part, streamed
and unloaded as any other, and its bytes are part of what the host asks room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from .lora_files import LowRank


class SidePath(nn.Module):
    """``up (down x)`` beside a linear: a forward hook of it that adds this to its output."""

    def __init__(self, update: LowRank, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.down = _linear(update.down, dtype)
        self.up = _linear(update.up, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in any float dtype -> [..., N] in the dtype of the updates."""
        return self.up(self.down(x.to(self.dtype)))

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """The linear's output [..., N] with the update added, in the dtype of the output."""
        return output + self(inputs[0]).to(output.dtype)


class LowRankModel(nn.Module):
    """Updates by the canonical names of the linears that they are for."""

    def __init__(self, updates: Mapping[str, LowRank], dtype: torch.dtype):
        super().__init__()
        self.names = tuple(updates)
        self.paths = nn.ModuleList(SidePath(update, dtype) for update in updates.values())

    def side_paths(self) -> Iterator[tuple[str, SidePath]]:
        """(linear, path): the same paths each time, so that nothing is compiled again for them."""
        return zip(self.names, self.paths, strict=True)


def load_low_rank(
    updates: Mapping[str, LowRank],
    dtype: torch.dtype,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The updates, in ``dtype``, under a patcher of the host's; also how the host loads them again.

    disable_dynamic: the host's wish for its older patcher.
    """
    model = LowRankModel(updates, dtype).to(offload_device)
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (load_low_rank, (updates, dtype, load_device, offload_device))
    return patcher


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    n, k = weight.shape
    linear = comfy.ops.manual_cast.Linear(k, n, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return linear
