"""A pretended GPU like Apple's: its tensors compute as on the CPU and refuse float64.

Tensors made on ``DEVICE``, or moved there, are stand-ins; anything of float64 on it raises, as
torch does on ``mps``. The name is one that torch asks no driver for; its values are real.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class There(Tensor):
    """Values of the CPU under the name of the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        self = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        self.held = held
        return self

    def __repr__(self) -> str:
        return f"There({self.held})"

    def new_tensor(self, data, dtype=None) -> There:
        """Torch makes it without asking the mode."""
        return There(torch.tensor(data, dtype=dtype or self.dtype))

    def tolist(self) -> object:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class NoFloat64(TorchDispatchMode):
    """While it is on, ``device="meta"`` gives such tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = []

    def held(value):
        if isinstance(value, There):
            given.append(value)
            return value.held
        return value

    inner, named = tree_map(held, args), tree_map(held, dict(kwargs))
    there = bool(given)
    if named.get("device") is not None:
        there = torch.device(named["device"]).type == DEVICE.type
        named["device"] = torch.device("cpu")
    if given:
        cpu = [
            t
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and not isinstance(t, There) and t.dim()
        ]
        if cpu and func is not torch.ops.aten.copy_.default and "index" not in func.name():
            raise RuntimeError(f"{func}: tensors on two devices")
    out = func(*inner, **named)
    if func is torch.ops.aten._to_copy.default and there and not given:
        out = out.clone()
    back = {id(value.held): value for value in given}
    first = args[0] if args and isinstance(args[0], Tensor) else None

    def wrap(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) in back:
            return back[id(value)]
        if not there or value is first:
            return value
        return There(value)

    return tree_map(wrap, out)
