"""Seeded random tensors, and how far one tensor is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values by a generator of their own, drawn in fp32 and cast to ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``, in fp64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
