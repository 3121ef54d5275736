"""Synthetic linears of a block at each level, with random codes: no file, no comfy-kitchen needed.

Each takes values or a fused block's ``Activation``, as the pack's layouts do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import blocks, dispatch, packed_int8, prequantized
from ...ops.fused import Activation, dense
from ...ops.gguf_compute import compute_here
from ...ops.linear import gguf_linear, int8_linear
from .common import random

ROTATION, GROUP = 256, 16
_DRAWN = 64  # rows that are quantized; the weight repeats them

LEVELS = (
    "INT8 W8A8 rotated",
    "Q4_K",
    "BF16",
    "W4A8",
    "INT8 W8A8",
    "Q8_0",
    "W6A8",
    "Q6_K",
    "IQ4_XS",
    "Q5_K",
)
"""In order of what is asked most often: what comes late may find no time."""

Inputs = Tensor | Activation


@dataclass(frozen=True)
class Linear:
    """``multiply``: values or an activation ``[..., K]`` -> ``[..., N]``; bytes of the weight."""

    multiply: Callable[[Inputs], Tensor]
    nbytes: int

    def __call__(self, x: Inputs) -> Tensor:
        return self.multiply(x)


def linear(level: str, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Linear:
    """A weight ``[n, k]`` of ``level`` in memory of its own."""
    if level == "BF16":
        return _dense(n, k, device, dtype)
    if level in ("W4A8", "W6A8"):
        return _packed(4 if level == "W4A8" else 6, n, k, device)
    if level in blocks.FORMATS:
        return _gguf(level, n, k, device)
    return _int8(n, k, device, ROTATION if level.endswith("rotated") else None)


def gguf_blocks(qtype: str, n: int, k: int, device: torch.device) -> Tensor:
    """Packed blocks ``uint8 [n, row bytes]`` of normal values, the first rows again and again."""
    return _few_blocks(qtype, k).to(device).repeat(-(-n // _DRAWN), 1)[:n].contiguous()


@cache
def _few_blocks(qtype: str, k: int) -> Tensor:
    return blocks.quantize(random((_DRAWN, k), torch.device("cpu"), torch.float32) / k**0.5, qtype)


def _dense(n: int, k: int, device: torch.device, dtype: torch.dtype) -> Linear:
    weight = random((n, k), device, dtype) / k**0.5
    return Linear(lambda x: F.linear(dense(x), weight), weight.nbytes)


def _int8(n: int, k: int, device: torch.device, rotation: int | None) -> Linear:
    weight = random((n, k), device, torch.int8)
    scale = torch.full((n,), 1 / 73 / k**0.5, device=device)  # 73: deviation of the codes

    def multiply(x: Inputs) -> Tensor:
        if not isinstance(x, Activation):
            return int8_linear(x, weight, scale, rotation=rotation)
        if not x.rows_pay(n, None, rotation):
            return int8_linear(x.dense(), weight, scale, rotation=rotation)
        q, scales = x.rows(None, rotation, dispatch.AUTO)
        out = prequantized.int8_product(q, scales, weight, scale, None, x.dtype, dispatch.AUTO)
        return out.reshape(*x.shape[:-1], n)

    return Linear(multiply, weight.nbytes + scale.nbytes)


def _gguf(qtype: str, n: int, k: int, device: torch.device) -> Linear:
    packed = gguf_blocks(qtype, n, k, device)

    def multiply(x: Inputs) -> Tensor:
        shape = (x.shape[:-1].numel(), n, k)
        way = compute_here("auto", qtype, shape, x.device, x.dtype, dispatch.AUTO)
        rows = isinstance(x, Activation) and way != "dense" and x.rows_pay(n, None, ROTATION)
        if not rows:
            return gguf_linear(dense(x), packed, qtype, (n, k))
        q, scales = x.rows(None, ROTATION, dispatch.AUTO)
        out = prequantized.gguf_product(
            q, scales, packed, qtype, None, ROTATION, x.dtype, dispatch.AUTO
        )
        return out.reshape(*x.shape[:-1], n)

    return Linear(multiply, packed.nbytes)


def _packed(bits: int, n: int, k: int, device: torch.device) -> Linear:
    codes = random((n, k * bits // 8), device, torch.int8)
    s_rel = torch.full((n, k // GROUP), 8.0 if bits == 4 else 2.0, device=device)
    s_rel = s_rel.to(torch.float8_e4m3fn)
    s_channel = torch.full((n,), 1 / 37 / k**0.5, device=device)
    parts = codes, s_rel, s_channel, None, GROUP

    def multiply(x: Inputs) -> Tensor:
        if not isinstance(x, Activation):
            return packed_int8.packed_linear(x, *parts, None, ROTATION, dispatch.AUTO)
        q, scales = x.rows(None, ROTATION, dispatch.AUTO)
        out = packed_int8.packed_product(q, scales, *parts, None, x.dtype, dispatch.AUTO)
        return out.reshape(*x.shape[:-1], n)

    return Linear(multiply, codes.nbytes + s_rel.nbytes + s_channel.nbytes)
