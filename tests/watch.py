"""What an op does that its result does not show: waiting for the device, and new memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default,  # .item(), bool(), float()
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}


class Watch(TorchDispatchMode):
    """Fails on what would wait for a GPU; ``largest`` is the most values of a tensor made anew.

    What runs inside a custom op is not seen: call its implementation. ``dtype``: count only such.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.largest = 0
        self._dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        assert func not in _WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        held = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            counted = isinstance(leaf, Tensor) and self._dtype in (None, leaf.dtype)
            if counted and _storage(leaf) not in held:
                self.largest = max(self.largest, leaf.numel())
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
