"""The tensor that a weight in one of our layouts is: ``QuantizedTensor`` that changes, or says why.

comfy-kitchen dequantizes for every operation it does not know, in-place ones included: the copy is
changed and thrown away. Here the changed values are quantized again into the same memory. What
reads raw memory (safetensors) is refused, and copies and pickles are whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor, get_layout_class
from torch import Tensor

from ...errors import OpError
from .kept import keeps_change

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.to.dtype_layout)
_MOVES = (aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.to.other)
MAPPED = "ideogram4_quant_origin"
"""Attribute of memory that is a view of a file: where in which, see ``checkpoint.mapped``."""
_SEED = 1  # of changes in place that are rounded by chance: the same every time
_WHOLE = "Change the whole weight, or its `.dequantize()`, and quantize that."


class Weight(QuantizedTensor):
    """A weight in one of our layouts.

    ``borrowed``: over memory that is not its own, a mapped file's or that of the weight it was made
    of (a copy to the caller, in another dtype), so it takes its own before it is written to.
    """

    borrowed = False
    home: Weight | None = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.record_stream.default:
            for tensor in args[0].layout_cls.get_plain_tensors(args[0]):
                tensor.record_stream(*args[1:])
            return None
        if func is aten.detach.default:
            # comfy-kitchen copies the scales: a change would reach half of the original
            alias = args[0]._copy_with(args[0]._qdata.detach(), clone_params=False)
            alias.home = getattr(args[0], "home", None)
            return alias
        if func._schema.is_mutable and not _plain_copy(func, args):
            return change(func, args, kwargs)
        if func is aten.copy_.default and isinstance(args[0], QuantizedTensor):
            _take_memory(args[0])
        back = _home(args, kwargs) if func in _MOVES else None
        if back is not None:
            return back
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _MOVES and isinstance(result, Weight) and is_mapped(args[0]._qdata):
            result.home = args[0] if result.device != args[0].device else None
        return _cast(func, args, kwargs, result) if func in _CASTS else result

    def _copy_with(
        self, qdata: Tensor | None = None, params: Any | None = None, clone_params: bool = True
    ) -> Weight:
        if params is None:
            params = self._params.clone() if clone_params else self._params
        return derived(self, self._qdata if qdata is None else qdata, params)

    @staticmethod
    def __tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride):
        other = QuantizedTensor.__tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride)
        return Weight(other._qdata, other._layout_cls, other._params)

    def requantize_from_float(self, tensor: Tensor, **kwargs: Any) -> QuantizedTensor:
        """``tensor`` [*shape] in this layout; a host's patched weight, with its seed.

        Where codes are coarse: to nearest if that keeps the change, else by chance, as asked.
        """
        layout = get_layout_class(self._layout_cls)
        seed = kwargs.get("stochastic_rounding")
        if seed and layout.COARSE and not self._params.transposed:
            nearest = super().requantize_from_float(tensor, **{**kwargs, "stochastic_rounding": 0})
            if keeps_change(self, tensor, nearest):
                return nearest
        return super().requantize_from_float(tensor, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Rows, columns or single values; torch would set those of a copy."""
        dense = self.dequantize()
        dense[index] = value.dequantize() if isinstance(value, QuantizedTensor) else value
        _write(((self, _encoded(self, dense, "w[...] = x")),))

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        if id(self) in memo:
            return memo[id(self)]
        copied = Weight(self._qdata.clone(), self._layout_cls, self._params.clone())
        memo[id(self)] = _like(self, copied)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        fields = {f.name: getattr(self._params, f.name) for f in dataclasses.fields(self._params)}
        fields = {name: _bytes_of_float8(value) for name, value in fields.items()}
        qdata = self._qdata.contiguous()
        parts = (self._layout_cls, qdata.view(torch.uint8), qdata.dtype, fields)
        return _rebuild, (*parts, isinstance(self, torch.nn.Parameter))

    def storage(self):
        """Refused: who asks for it reads the packed bytes as floats, as safetensors does."""
        raise OpError(
            "a quantized weight cannot be saved as a plain tensor: its memory holds packed codes",
            found=f"{self._layout_cls} {list(self.shape)}",
            needed="its stored parts or its values",
            hint="Save `weight.state_dict(name)` (all parts), or `weight.dequantize()`; in ComfyUI "
            "the Save nodes do the first. A file is made by `ideogram4-quant quantize`.",
        )

    def numpy(self, *, force: bool = False):
        """The true values, as of ``dequantize()``: the memory holds codes."""
        return self.dequantize().numpy(force=force)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a plain tensor lies in a mapped file, which the process holds no memory for."""
    return hasattr(tensor.untyped_storage(), MAPPED)


def derived(qt: QuantizedTensor, qdata: Tensor, params: Any) -> Weight:
    """A view or alias of ``qt``."""
    weight = Weight(qdata, qt._layout_cls, params)
    weight.borrowed = getattr(qt, "borrowed", False)
    return weight


def change(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation that writes to its arguments: run on true values, which are quantized again.

    In the memory the weight has, so that row slices write through. Raises OpError, before anything
    is written, for a result of another shape, one with NaN or infinity, and rows whose scale is
    shared with rows outside them.
    """
    opened: dict[int, tuple[QuantizedTensor, Tensor]] = {}

    def dense(value: Any) -> Any:
        if isinstance(value, QuantizedTensor):
            return opened.setdefault(id(value), (value, value.dequantize()))[1]
        if isinstance(value, list | tuple):
            return type(value)(dense(item) for item in value)
        return value

    result = func(*dense(args), **{name: dense(value) for name, value in kwargs.items()})
    written = [opened[id(t)] for t in _written(func, args, kwargs) if id(t) in opened]
    _write([(qt, _encoded(qt, values, func.__name__)) for qt, values in written])
    back = {id(values): qt for qt, values in written}
    if isinstance(result, list | tuple):
        return type(result)(back.get(id(item), item) for item in result)
    return back.get(id(result), result)


def _cast(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Weight) -> Weight:
    """What ``to`` gave in inference mode, where comfy-kitchen shares the memory silently."""
    if result._qdata is not args[0]._qdata:
        return result
    asked = args[3] if func is aten.to.dtype and len(args) > 3 else kwargs.get("copy", False)
    if asked:
        return Weight(result._qdata.clone(), result._layout_cls, result._params.clone())
    if result is not args[0]:
        result.borrowed = True
    return result


def _home(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The weight in a mapped file that ``to`` asks for, where this one was moved from it."""
    home = getattr(args[0], "home", None)
    if home is None:
        return None
    given = [*args[1:], *kwargs.values()]
    given += [t for like in given if isinstance(like, Tensor) for t in (like.device, like.dtype)]
    device = next((value for value in given if isinstance(value, torch.device)), None)
    dtype = next((value for value in given if isinstance(value, torch.dtype)), args[0].dtype)
    asked = kwargs.get("copy", False) or any(value is True for value in args[4:5])
    return home.to(dtype) if device == home._qdata.device and not asked else None


def _plain_copy(func: Any, args: Sequence[Any]) -> bool:
    """``w.copy_(v)`` of one layout: bytes to bytes, as comfy-kitchen does it."""
    if func is not aten.copy_.default:
        return False
    to, source = args[:2]
    both = isinstance(to, QuantizedTensor) and isinstance(source, QuantizedTensor)
    return (
        both and to._layout_cls == source._layout_cls and to.storage_shape == source.storage_shape
    )


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The tensors that the schema says are written to."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        yield from value if isinstance(value, list | tuple) else (value,)


def _encoded(qt: QuantizedTensor, values: Tensor, what: str) -> tuple[Tensor, Any]:
    """(storage, parameters) of new values for ``qt``."""
    where = {"found": f"{what} of {list(values.shape)}", "needed": f"{list(qt.shape)}"}
    if values.shape != qt.shape:
        raise OpError("a quantized weight keeps its shape", **where, hint=_WHOLE)
    if not bool(values.isfinite().all()):
        raise OpError("the changed weight holds NaN or infinity", found=what, needed="numbers")
    layout, params = get_layout_class(qt._layout_cls), qt._params
    matrix = values.t().contiguous() if params.transposed else values
    options = layout.requantize_kwargs(qt)
    qdata, fresh = layout.quantize(matrix, **options)
    if not layout.KEEPS_CHANGES:
        stored = qt.t() if params.transposed else qt
        if not keeps_change(stored, matrix, Weight(qdata, qt._layout_cls, fresh)):
            qdata, fresh = layout.quantize(matrix, **options, stochastic_rounding=_SEED)
    partial = qt._qdata.nbytes < qt._qdata.untyped_storage().nbytes()
    for name in params._tensor_fields():
        own = (*layout.ROW_FIELDS, *layout.COLUMN_FIELDS)
        shared = name not in own or getattr(params, name).dim() == 0
        if partial and shared and not torch.equal(getattr(params, name), getattr(fresh, name)):
            raise OpError(
                f"these rows share their {name} with others, which would change too",
                found=what,
                needed="a weight with a scale for each row",
                hint=_WHOLE,
            )
    return qdata, fresh


def _write(changes: Sequence[tuple[QuantizedTensor, tuple[Tensor, Any]]]) -> None:
    for qt, (qdata, fresh) in changes:
        _take_memory(qt)
        qt._qdata.copy_(qdata)
        for name in qt._params._tensor_fields():
            getattr(qt._params, name).copy_(getattr(fresh, name))


def _take_memory(qt: QuantizedTensor) -> None:
    """Before a write: memory of its own for one that shares a weight's, or a file's."""
    qt.home = None
    if getattr(qt, "borrowed", False):
        qt._qdata, qt._params = qt._qdata.clone(), qt._params.clone()
        qt.borrowed = False


def _bytes_of_float8(value: Any) -> Any:
    """A float8 tensor as (its bytes, its dtype), which pickle knows; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 1:
        return value.contiguous().view(torch.uint8), value.dtype
    return value


def _float8_of_bytes(value: Any) -> Any:
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)
    return value[0].view(value[1]) if pair else value


def _like(original: Tensor, copied: Weight) -> Weight:
    """``copied`` as a parameter where ``original`` is one."""
    is_param = isinstance(original, torch.nn.Parameter)
    return torch.nn.Parameter(copied, requires_grad=False) if is_param else copied


def _rebuild(
    layout: str, data: Tensor, dtype: torch.dtype, fields: dict[str, Any], is_param: bool
) -> Weight:
    """A pickled weight again; of the layout of that name, under whatever name this package has."""
    fields = {name: _float8_of_bytes(value) for name, value in fields.items()}
    weight = Weight(data.view(dtype), layout, get_layout_class(layout).Params(**fields))
    return torch.nn.Parameter(weight, requires_grad=False) if is_param else weight
