"""How the layouts answer torch's own operations: linear, matmul, transposes, row slices.

Operations in place are those of ``weight``; everything else falls back to the dequantized weight,
as comfy-kitchen arranges. In inference mode
``F.linear`` arrives as ``aten.linear``; outside it as a transpose and a ``mm`` or ``addmm``, except
for batches of strided activations, which torch turns into a batched product: those are computed
with the dequantized weight. ``ops.linear.linear`` knows no such exception.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor.base import QuantizedTensor, dequantize_args, register_layout_op
from torch import Tensor

from ..linear import LinearOptions
from .base import Layout
from .weight import Weight, change

aten = torch.ops.aten


def register_handlers(layout: type[Layout]) -> None:
    """Register every handler below for ``layout``."""
    for ops, handler in _HANDLERS.items():
        for op in ops:
            register_layout_op(op, layout)(handler)
    # for a tensor that comfy-kitchen's own class made of our layout; a Weight sees to it itself
    for op in _in_place_operations():
        register_layout_op(op, layout)(_changing(op))


@functools.cache
def _in_place_operations() -> tuple[Any, ...]:
    names = (name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_"))
    packets = (getattr(aten, name, None) for name in names)
    overloads = (getattr(p, o) for p in packets if p is not None for o in p.overloads())
    return tuple(op for op in overloads if op._schema.is_mutable and op not in _HANDLERS)


def _changing(op: Any) -> Callable:
    return lambda qt, args, kwargs: change(op, args, kwargs)


def _own(value: Any) -> bool:
    return isinstance(value, QuantizedTensor) and hasattr(value.layout_cls, "slice_rows")


def _multiply(x: Any, weight: Any, bias: Tensor | None) -> Tensor | None:
    """``x @ weight.T + bias`` by the layout of ``weight [N, K]``, or None where it cannot."""
    if not _own(weight) or weight._params.transposed or isinstance(x, QuantizedTensor):
        return None
    return weight.layout_cls.linear(x, weight, bias, LinearOptions())


def _linear(_: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    out = _multiply(x, weight, bias)
    return F.linear(*dequantize_args((x, weight, bias))) if out is None else out


def _matmul(_: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    x, weight = args
    out = None
    if _own(weight):
        out = _multiply(x, weight.layout_cls.transpose(weight), None)
    # For mm too: the other operand is a matrix then.
    return torch.matmul(*dequantize_args((x, weight))) if out is None else out


def _addmm(_: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight = args
    out = None
    plain = kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1
    if plain and _own(weight) and bias.dim() == 1 and bias.shape[0] == weight.shape[1]:
        out = _multiply(x, weight.layout_cls.transpose(weight), bias)
    if out is None:
        return torch.addmm(*dequantize_args((bias, x, weight)), **kwargs)
    return out


def _to_device(
    qt: QuantizedTensor,
    device: torch.device,
    dtype: torch.dtype,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
) -> QuantizedTensor:
    """``w.to(device, dtype)`` in inference mode, which comfy-kitchen would dequantize."""
    params = qt._params
    moves = torch.device(device) != qt._qdata.device
    if not (moves or copy) and dtype == params.orig_dtype:
        return qt
    params = params.to_device(device) if moves else params.clone()
    qdata = qt._qdata.to(device, non_blocking=non_blocking, copy=copy)
    moved = Weight(qdata, qt._layout_cls, dataclasses.replace(params, orig_dtype=dtype))
    moved.borrowed = not (moves or copy)
    return moved


def _to_other(qt: QuantizedTensor, other: Tensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    return _to_device(qt, other.device, other.dtype, *args, **kwargs)


def _alias(qt: QuantizedTensor) -> QuantizedTensor:
    return qt._copy_with(clone_params=False)


def _transpose(qt: QuantizedTensor, dim0: int = 0, dim1: int = 1) -> Any:
    return _alias(qt) if dim0 % 2 == dim1 % 2 else qt.layout_cls.transpose(qt)


def _permute(qt: QuantizedTensor, dims: Sequence[int]) -> Any:
    return _transpose(qt, 0, dims[0])


def _rows(qt: QuantizedTensor, dim: int, rows: slice) -> Any:
    """``qt`` restricted to ``rows`` of dimension ``dim``: quantized where storage allows it."""
    stored_dim = 1 if qt._params.transposed else 0
    if rows.indices(qt.shape[dim]) == (0, qt.shape[dim], 1):
        return _alias(qt)
    if dim % 2 != stored_dim or not qt.layout_cls.can_slice_rows(qt._params):
        return qt.dequantize()[(slice(None),) * (dim % 2) + (rows,)]
    return qt.layout_cls.slice_rows(qt, rows)


def _slice(
    qt: QuantizedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    return _rows(qt, dim, slice(start, end, step))


def _narrow(qt: QuantizedTensor, dim: int, start: int, length: int) -> Any:
    size = qt.shape[dim]
    begin = start + size if start < 0 else start
    if not 0 <= begin <= begin + length <= size:
        raise RuntimeError(
            f"narrow: start {start} and length {length} exceed dimension size {size}"
        )
    return _rows(qt, dim, slice(begin, begin + length))


def _split_sizes(qt: QuantizedTensor, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    if sum(sizes) != qt.shape[dim]:
        raise RuntimeError(f"split sizes {list(sizes)} do not add up to {qt.shape[dim]}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_rows(qt, dim, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _split(qt: QuantizedTensor, size: int, dim: int = 0) -> list[Any]:
    total = qt.shape[dim]
    return [_rows(qt, dim, slice(at, min(at + size, total))) for at in range(0, total, size)]


def _chunk(qt: QuantizedTensor, chunks: int, dim: int = 0) -> list[Any]:
    return _split(qt, max(1, math.ceil(qt.shape[dim] / chunks)), dim)


def _call(function: Callable) -> Callable:
    return lambda qt, args, kwargs: function(*args, **kwargs)


_HANDLERS: dict[tuple[Any, ...], Callable] = {
    (aten.linear.default,): _linear,
    (aten.mm.default, aten.matmul.default): _matmul,
    (aten.addmm.default,): _addmm,
    (aten.to.device,): _call(_to_device),
    (aten.to.other,): _call(_to_other),
    (aten.alias.default, aten.lift_fresh.default): _call(_alias),
    (
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.transpose.int,
    ): _call(_transpose),
    (aten.permute.default,): _call(_permute),
    (aten.slice.Tensor,): _call(_slice),
    (aten.narrow.default,): _call(_narrow),
    (aten.split.Tensor,): _call(_split),
    (aten.split.sizes, aten.split_with_sizes.default): _call(_split_sizes),
    (aten.chunk.default,): _call(_chunk),
}
