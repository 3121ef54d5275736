"""Sums in float64, also of tensors on devices that have none (Apple's GPUs, some of Intel's)."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT = frozenset({"mps"})


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` computes in float64 at all."""
    if device.type in _WITHOUT:
        return False
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return True


def wide(values: Tensor) -> Tensor:
    """``values`` in float64: where they lie, or on the CPU where their device has none."""
    return (values if has_float64(values.device) else values.cpu()).double()


def wide_sum(values: Tensor, dim: int | None = None) -> Tensor:
    """``values`` summed in float64 over ``dim`` (None: all), on the CPU."""
    values = values if has_float64(values.device) else values.cpu()
    return values.sum(dim, dtype=torch.float64).cpu()
