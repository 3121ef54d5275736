"""comfy-kitchen's own products for weights that are no plain int8, and when they are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .adapters import kitchen_backend

# Compute capabilities with int4 matrix units; the op runs elsewhere as emulation.
_INT4_UNITS = ((7, 5), (9, 0))


def chosen(op: str, shape: tuple[int, int, int], device: torch.device, backend: str) -> bool:
    """Whether comfy-kitchen's kernel ``op`` runs a weight of ``shape`` (M, N, K) on ``device``.

    Where a backend named, or "auto" as for an INT8 weight, takes comfy-kitchen's kernels and they
    have the op; for the one on int4 activations, where the device multiplies int4.
    """
    if device.type != "cuda":
        return False
    taken = dispatch.choose("int8_linear", shape, device, backend)
    if taken.name != "comfy_kitchen" or op not in _capabilities():
        return False
    if op != "convrot_w4a4_linear":
        return True
    first, beyond = _INT4_UNITS
    return first <= torch.cuda.get_device_capability(device) < beyond


def _capabilities() -> Any:
    from comfy_kitchen.registry import registry

    return registry.list_backends().get(kitchen_backend(), {}).get("capabilities", ())


def w4a8_linear(x: Tensor, packed: Tensor, params: Any, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` by the best backend of comfy-kitchen; MMA-packed weights too."""
    from comfy_kitchen.tensor import w4a8_int8_linear

    more = {"mma_packed": True} if params.mma_packed else {}  # 0.2.31 packs nothing
    return w4a8_int8_linear(
        x,
        packed,
        params.scale,
        params.s_channel,
        codebook=params.codebook,
        correction=params.correction,
        bias=bias,
        group_size=params.group_size,
        convrot_groupsize=params.convrot_groupsize,
        out_dtype=x.dtype,
        **more,
    )


def w4a4_linear(x: Tensor, packed: Tensor, params: Any, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` on int4 activations by the best backend of comfy-kitchen."""
    from comfy_kitchen.tensor import convrot_w4a4_linear

    return convrot_w4a4_linear(
        x,
        packed,
        params.scale,
        bias=bias,
        convrot_groupsize=params.convrot_groupsize,
        quant_group_size=params.quant_group_size,
        linear_dtype=params.linear_dtype,
    )
