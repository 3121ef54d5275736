"""Weights stored in FP8, and in int8 with a scale a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.layouts import fp8_tensor
from .codecs import ROW_FP8, Stored
from .parts import Parts

_E8M0 = ("F8_E8M0", "U8")
"""Of scales that are powers of two, which plain FP8 has not."""


@dataclass(frozen=True)
class Fp8(Stored):
    """``W = data * scale``: data e4m3 or e5m2, scale fp32 [], [N], or [a, b] of blocks."""

    ROLES = ("scale",)
    FORMATS = (
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise"),
        ROW_FP8,
    )
    data: Tensor
    scale: Tensor

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.weight.dtype in ("F8_E4M3", "F8_E5M2")

    @classmethod
    def level(cls, parts: Parts) -> str:
        scale = parts.roles.get("scale")
        if scale is not None and scale.dtype in _E8M0 and not parts.quantization():
            raise parts.undescribed("mxfp8", f"{scale.key} {scale.dtype}")
        blocks = parts.scale_blocks()
        told = parts.setting("group_size", None)
        # convert_to_quant says it of weights, too, whose sizes it does not divide: scales a row
        fits = blocks is None or told in (*blocks, list(blocks))
        parts.check_format(*cls.FORMATS, keys=("group_size",) if fits else ())
        if not parts.weight.shape:
            raise parts.corrupt("a weight without dimensions", "[]", "[N] or [N, K]")
        if "scale" in parts.roles:
            if blocks is None:
                parts.check_scale()
                parts.check_vector("scale", (1, parts.weight.shape[0]))
        elif parts.quantization():  # a file cast to fp8 without scaling has neither
            raise parts.corrupt("fp8 that is described and has no scale", "none", "weight_scale")
        return "FP8"

    @classmethod
    def read(cls, parts: Parts) -> Fp8:
        blocks = parts.scale_blocks()
        scale = parts.scale(parts.weight.shape[0]) if blocks is None else parts.matrix("scale")
        # A file cast to fp8 without scaling has none.
        return cls(parts.weight.read(), torch.ones(()) if scale is None else scale)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return fp8_tensor(self.data, self.scale, dtype=dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self.data.dim() == 2:
            return super().dense(dtype)
        return (self.data.float() * self.scale).to(dtype)

    @classmethod
    def stack(cls, items: Sequence[Fp8]) -> Fp8 | None:
        if len({item.data.dtype for item in items}) > 1:
            return None
        data = torch.cat([item.data.view(torch.uint8) for item in items]).view(items[0].data.dtype)
        blocks = {item.scale.shape[-1] if item.scale.dim() == 2 else 0 for item in items}
        if blocks == {0}:
            scale = torch.cat([item.scale.expand(len(item.data)) for item in items])
            return cls(data, scale)
        heights = {len(item.data) / len(item.scale) if item.scale.dim() else 0 for item in items}
        if len(blocks) > 1 or len(heights) > 1:
            return None
        return cls(data, torch.cat([item.scale for item in items]))


@dataclass(frozen=True)
class Int8Blocks(Fp8):
    """``W = data * scale``: data int8 [N, K], scale fp32 [a, b] of blocks of N / a x K / b."""

    FORMATS = ("int8_blockwise", "int8_tensorwise", ROW_FP8)

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.weight.dtype == "I8" and parts.scale_blocks() is not None

    @classmethod
    def level(cls, parts: Parts) -> str:
        super().level(parts)
        return "INT8 blockwise"
