"""NVFP4 and MXFP8 in the host's container: small floats with a scale a block, in cuBLAS's tiles.

The names of tensors are those that ComfyUI 0.33 and comfy-kitchen 0.2.40 write; what a description
says beside the format (``group_size``, ``orig_shape``) and the hybrid form are convert_to_quant's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.layouts import mxfp8_tensor, nvfp4_tensor
from ..ops.layouts.microscaled import mxfp8_shapes, nvfp4_shapes
from .parts import Parts
from .stock import StockStored, integer

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""Of codes and of their block scales."""


class Microscaled(StockStored):
    """Base: rows and columns are padded to whole blocks, the weight's own are in ``orig_shape``."""

    SETTINGS = ("group_size",)
    BLOCK: ClassVar[int]  # columns that share a scale
    SCALE: ClassVar[str]

    @classmethod
    @abstractmethod
    def stored_shapes(cls, rows: int, columns: int) -> Shapes:
        """Of a weight [rows, columns]."""

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        rows, columns = super().shape(parts)
        told = parts.setting("orig_shape", None)
        own = isinstance(told, list) and len(told) == 2 and all(type(size) is int for size in told)
        fits = own and 0 < told[0] <= rows and 0 < told[1] <= columns
        if fits and cls.stored_shapes(*told)[0] == tuple(parts.weight.shape):
            return tuple(told)
        return rows, columns

    @classmethod
    def check_beside(cls, parts: Parts) -> None:
        """The same unless the weight and its block scales have the shapes that they need."""
        if integer(parts, "group_size", cls.BLOCK) != cls.BLOCK:
            raise parts.variant(f"{cls.FORMAT} with group_size {parts.setting('group_size', '')}")
        cls.check_dtype(parts, "scale", cls.SCALE)
        raws = (parts.weight, parts.roles["scale"])
        pairs = zip(raws, cls.stored_shapes(*cls.shape(parts)), strict=True)
        for (raw, needed), what in zip(pairs, ("codes", "block scales"), strict=True):
            if tuple(raw.shape) != needed:
                message = f"{raw.key}: {what} of another size"
                raise parts.corrupt(message, list(raw.shape), list(needed))


@dataclass(frozen=True)
class NVFP4(Microscaled):
    """``W = e2m1 * block scale * scale_2``, blocks of 16."""

    FORMAT = "nvfp4"
    LEVEL = "NVFP4"
    WEIGHT = "U8"
    ROLES = NEEDED = ("scale", "scale_2")
    BLOCK = 16
    SCALE = "F8_E4M3"

    data: Tensor
    block_scale: Tensor
    scale: Tensor
    size: tuple[int, ...]  # of the weight, without padding

    @classmethod
    def stored_shapes(cls, rows: int, columns: int) -> Shapes:
        return nvfp4_shapes(rows, columns)

    @classmethod
    def check_beside(cls, parts: Parts) -> None:
        super().check_beside(parts)
        parts.check_vector("scale_2", (1,))

    @classmethod
    def read(cls, parts: Parts) -> NVFP4:
        blocks, scale = cls.as_dtype(parts, "scale", cls.SCALE), parts.vector("scale_2", (1,))
        return cls(cls.read_codes(parts), blocks, scale, cls.shape(parts))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return nvfp4_tensor(self.data, self.block_scale, self.scale, self.size, dtype=dtype)

    @classmethod
    def stack(cls, items: Sequence[NVFP4]) -> NVFP4 | None:
        """Where tiles end with the pieces and all have one scale."""
        first = items[0]
        alike = all(torch.equal(item.scale, first.scale) for item in items)
        if not alike or any(item.size[0] % 128 for item in items):
            return None
        blocks = torch.cat([item.block_scale.view(torch.uint8) for item in items])
        data = torch.cat([item.data for item in items])
        size = (len(data), first.size[1])
        return cls(data, blocks.view(first.block_scale.dtype), first.scale, size)


@dataclass(frozen=True)
class MXFP8(Microscaled):
    """``W = e4m3 * 2^e``, blocks of 32.

    The hybrid form has one scale for all beside them, for cards that multiply FP8 and not this.
    """

    FORMAT = "mxfp8"
    ALSO = ("hybrid_mxfp8",)
    LEVEL = "MXFP8"
    WEIGHT = "F8_E4M3"
    ROLES = ("scale", "scalar")
    NEEDED = ("scale",)
    PER_BYTE = 1
    BLOCK = 32
    SCALE = "F8_E8M0"

    data: Tensor
    scale: Tensor
    size: tuple[int, ...]

    @classmethod
    def stored_shapes(cls, rows: int, columns: int) -> Shapes:
        return mxfp8_shapes(rows, columns)

    @classmethod
    def read(cls, parts: Parts) -> MXFP8:
        scale = cls.as_dtype(parts, "scale", cls.SCALE)
        return cls(cls.read_codes(parts), scale, cls.shape(parts))

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return mxfp8_tensor(self.data, self.scale, self.size, dtype=dtype)

    @classmethod
    def stack(cls, items: Sequence[MXFP8]) -> MXFP8 | None:
        if any(item.size[0] % 128 for item in items):
            return None
        scale = torch.cat([item.scale.view(torch.uint8) for item in items])
        data = torch.cat([item.data.view(torch.uint8) for item in items])
        first = items[0]
        size = (len(data), first.size[1])
        return cls(data.view(first.data.dtype), scale.view(first.scale.dtype), size)
