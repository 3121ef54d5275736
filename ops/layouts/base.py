"""What the layouts share: their parameters, row slices and chunked work.

A layout tells comfy-kitchen's ``QuantizedTensor`` how its storage is decoded, encoded, moved and
multiplied. The package may be imported twice under two names; the class registered last then serves
the tensors of both, so parameters are read by field name and never by class.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedLayout, QuantizedTensor
from torch import Tensor

from ...errors import OpError
from ..linear import ACTIVATION_DTYPES, LinearOptions
from .weight import derived


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseParams(ABC):
    """Everything but the storage. ``orig_shape`` is the logical one: (K, N) once transposed."""

    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    transposed: bool = False

    @property
    @abstractmethod
    def label(self) -> str:
        """The type as reports show it."""

    def _tensor_fields(self) -> list[str]:
        names = (f.name for f in dataclasses.fields(self))
        return [name for name in names if isinstance(getattr(self, name), Tensor)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> BaseParams:
        changed = {name: function(getattr(self, name)) for name in self._tensor_fields()}
        return dataclasses.replace(self, **changed)

    def to_device(self, device: torch.device) -> BaseParams:
        """The same with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device=device))

    def clone(self) -> BaseParams:
        """The same with copies of every tensor."""
        return self._map(lambda tensor: tensor.clone())

    def copy_from(self, src: BaseParams, non_blocking: bool = False) -> None:
        """Take over ``src``: tensors into the memory held here, where both have one."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(src, field.name)
            if not isinstance(theirs, Tensor):
                object.__setattr__(self, field.name, theirs)
            elif isinstance(mine, Tensor) and mine.shape == theirs.shape:
                mine.copy_(theirs, non_blocking=non_blocking)
            else:
                device = mine.device if isinstance(mine, Tensor) else self._device(theirs)
                copied = theirs.to(device, copy=True, non_blocking=non_blocking)
                object.__setattr__(self, field.name, copied)

    def _device(self, fallback: Tensor) -> torch.device:
        fields = self._tensor_fields()
        return getattr(self, fields[0]).device if fields else fallback.device

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) as stored, whether transposed or not."""
        return tuple(reversed(self.orig_shape)) if self.transposed else tuple(self.orig_shape)


class Layout(QuantizedLayout):
    """Base of the layouts; a subclass decodes, encodes and names its per-row parameters."""

    NAME: str
    ROW_FIELDS: tuple[str, ...] = ()
    COLUMN_FIELDS: tuple[str, ...] = ()  # whose columns are the weight's rows
    COARSE = False  # so few codes that rounding by chance is a loss to see (``kept``)
    KEEPS_CHANGES = False  # encoding a changed weight sees to that by itself, without a seed

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """``x @ weight.T + bias``; here through the dequantized weight, in the dtype of ``x``."""
        dense = weight.to(dtype=x.dtype).dequantize()
        if x.shape[-1:] != dense.shape[1:]:
            raise OpError(
                "in_features of x and weight differ",
                found=f"x {tuple(x.shape)}",
                needed=f"[..., {dense.shape[1]}]",
            )
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))

    @classmethod
    def input_recipe(
        cls, weight: QuantizedTensor, tokens: int, dtype: torch.dtype, options: LinearOptions
    ) -> tuple[Tensor | None, int | None] | None:
        """``(smooth, rotation)`` of the int8 rows this weight multiplies; None: it takes values.

        For an input of so many tokens in ``dtype``.
        """
        return None

    @classmethod
    def multiply_rows(
        cls,
        q: Tensor,
        scale: Tensor,
        weight: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        options: LinearOptions,
    ) -> Tensor:
        """``rows @ weight.T + bias``, rows as ``input_recipe`` says -> ``[M, N]`` in ``dtype``."""
        raise NotImplementedError(f"{cls.NAME} multiplies values")

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        """The storage, then the tensors of the parameters in the order of their fields."""
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """Key suffix to tensor: ``""`` is the storage, ``"_scale"`` the field ``scale``, ..."""
        fields = {f"_{name}": getattr(params, name) for name in params._tensor_fields()}
        return {"": qdata, **fields}

    @classmethod
    @abstractmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """What ``comfy_quant`` says beside these tensors in a file: ``format``, and what they lack.

        A stock format where stock ComfyUI computes the same from it, else one of our name.
        """

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        """Whether a run of rows is a run of the storage."""
        return True

    @classmethod
    def slice_rows(cls, qtensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
        """Rows ``rows`` of the stored matrix as a quantized view; nothing is copied."""
        params = qtensor._params
        qdata = qtensor._qdata[rows]
        changed = {
            name: value[rows]
            for name in cls.ROW_FIELDS
            if (value := getattr(params, name)) is not None and value.dim() > 0
        }
        for name in cls.COLUMN_FIELDS:
            value = getattr(params, name)
            changed[name] = None if value is None else value[:, rows]
        shape = (qdata.shape[0], params.matrix_shape[1])
        changed["orig_shape"] = shape[::-1] if params.transposed else shape
        return derived(qtensor, qdata, dataclasses.replace(params, **changed))

    @classmethod
    def transpose(cls, qtensor: QuantizedTensor) -> QuantizedTensor:
        """The transposed matrix over the same storage: a flag."""
        params = qtensor._params
        flipped = dataclasses.replace(
            params, orig_shape=tuple(params.orig_shape)[::-1], transposed=not params.transposed
        )
        return derived(qtensor, qtensor._qdata, flipped)


def generator_for(seed: int | None, device: torch.device) -> torch.Generator | None:
    """The source of stochastic rounding for the host's seed; None (round to nearest) for 0."""
    if not seed or seed < 0:
        return None
    return torch.Generator(device=device).manual_seed(seed)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform fp32 values in [0, 1) in the shape of ``like``."""
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def check_matrix(tensor: Tensor, what: str) -> None:
    """OpError unless ``tensor`` is a floating point matrix: only linear weights are quantized."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise OpError(
            f"{what} takes a floating point matrix",
            found=f"{tensor.dtype} {tuple(tensor.shape)}",
        )


def check_dtype(dtype: torch.dtype) -> None:
    """OpError unless ``dtype`` is one that weights are dequantized to."""
    if dtype not in ACTIVATION_DTYPES:
        raise OpError("a weight has no such dtype", found=dtype, needed=ACTIVATION_DTYPES)


def check_same_device(qdata: Tensor, **others: Tensor | None) -> None:
    """OpError naming the first of ``others`` that lies elsewhere than ``qdata``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != qdata.device:
            raise OpError(
                f"{name} lies on another device than the weight",
                found=tensor.device,
                needed=qdata.device,
            )
