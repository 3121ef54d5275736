"""NF4 as bitsandbytes saves it: packed codes, their scales, and a description in JSON.

Beside the packed ``weight`` (uint8, two codes a byte) lie ``absmax``, ``quant_map`` (16 values) and
``quant_state.bitsandbytes__nf4``, a uint8 tensor of JSON with the weight's shape. With double
quantization ``absmax`` is uint8 itself: ``absmax = nested_quant_map[absmax] * nested_absmax[block]
+ nested_offset``. Source: bitsandbytes, ``functional.QuantState``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.layouts import nf4_tensor
from .codecs import Stored
from .parts import Parts

SAVED_NF4 = "ideogram4_quant_nf4"
"""Format name, in ``comfy_quant``, of NF4 that the host saved."""

_MAX_OFFSET = 1e6  # the mean of a model's largest weights is below 1


@dataclass(frozen=True)
class Nf4(Stored):
    """``W = code[nibble] * absmax[block]``, the blocks running over the flattened weight."""

    ROLES = ("absmax", "quant_map", "quant_state", "nested_absmax", "nested_quant_map")
    data: Tensor
    absmax: Tensor
    weight_shape: tuple[int, int]
    block_size: int
    code: Tensor

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return "absmax" in parts.roles or "quant_state" in parts.roles

    @classmethod
    def level(cls, parts: Parts) -> str:
        parts.check_format(SAVED_NF4)
        _state(parts)
        return "NF4"

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        return _state(parts)[0]

    @classmethod
    def read(cls, parts: Parts) -> Nf4:
        shape, block_size, state = _state(parts)
        count = math.prod(shape)
        if parts.weight.dtype != "U8" or parts.weight.nbytes != -(-count // 2):
            raise parts.corrupt(
                "the packed weight does not fit its shape",
                f"{parts.weight.nbytes} bytes of {parts.weight.dtype}",
                f"{-(-count // 2)} bytes for {list(shape)}",
            )
        code = _floats(parts, "quant_map", 16)
        absmax = _absmax(parts, -(-count // block_size), state)
        return cls(parts.weight.read().reshape(-1), absmax, shape, block_size, code)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return nf4_tensor(
            self.data,
            self.absmax,
            self.weight_shape,
            dtype=dtype,
            block_size=self.block_size,
            code=self.code,
        )

    @classmethod
    def stack(cls, items: Sequence[Nf4]) -> Nf4 | None:
        first = items[0]
        for item in items:
            # a weight that ends inside a block or a byte cannot be followed by another
            if math.prod(item.weight_shape) % item.block_size or item.block_size % 2:
                return None
            if item.block_size != first.block_size or not torch.equal(item.code, first.code):
                return None
        rows = sum(item.weight_shape[0] for item in items)
        return cls(
            torch.cat([item.data for item in items]),
            torch.cat([item.absmax for item in items]),
            (rows, first.weight_shape[1]),
            first.block_size,
            first.code,
        )


def _state(parts: Parts) -> tuple[tuple[int, int], int, Mapping[str, Any]]:
    """(shape, block size, the whole description), checked."""
    state = parts.json("quant_state")
    kind = state.get("quant_type")
    if kind != "nf4":
        raise parts.unsupported(f"bitsandbytes {kind}")
    shape, block_size = state.get("shape"), state.get("blocksize")
    sizes = [*shape, block_size] if isinstance(shape, list) and len(shape) == 2 else []
    if not sizes or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise parts.corrupt(
            "unusable NF4 description",
            f"shape {shape}, blocksize {block_size}",
            "[N, K] and a size",
        )
    return (shape[0], shape[1]), block_size, state


def _absmax(parts: Parts, count: int, state: Mapping[str, Any]) -> Tensor:
    """fp32 [count], double quantization undone."""
    raw = parts.roles.get("absmax")
    if raw is None or raw.dtype != "U8":
        return _floats(parts, "absmax", count)
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    usable = isinstance(offset, int | float) and -_MAX_OFFSET < offset < _MAX_OFFSET
    if type(size) is not int or size < 1 or not usable:
        raise parts.corrupt(
            "unusable double quantization",
            f"nested_blocksize {size}, nested_offset {offset}",
            "a size and a number",
        )
    codes = raw.read().reshape(-1)
    if codes.numel() != count:
        raise parts.corrupt(f"{raw.key} has a wrong size", codes.numel(), count)
    table = _floats(parts, "nested_quant_map", 256)
    scales = _floats(parts, "nested_absmax", -(-count // size))
    # no more copies of a scale than there are blocks, whatever the description says
    repeated = scales.repeat_interleave(min(size, count))[:count]
    return table[codes.int()] * repeated + float(offset)


def _floats(parts: Parts, role: str, count: int) -> Tensor:
    """The fp32 tensor of ``role`` with ``count`` finite values."""
    raw = parts.roles.get(role)
    if raw is None:
        raise parts.corrupt(f"NF4 without {role}", "no such tensor", f"{count} floats")
    return parts.vector(role, (count,))
