"""Int8 products of other libraries under the signatures of ``ops.reference``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import reference
from .chunks import tile_values
from .rotation import rotate

logger = logging.getLogger(__name__)

KITCHEN_GROUPS = (256, 64, 16)
"""Rotation groups of comfy-kitchen's int8 kernels."""


def kitchen_backend() -> str:
    """comfy-kitchen's name of the backend with its own kernels for this torch: CUDA or ROCm."""
    return "hip" if torch.version.hip else "cuda"


def comfy_kitchen_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """``reference.int8_linear`` by comfy-kitchen's CUDA or ROCm kernels; ``x [M, K]``.

    They know no smoothing, and rotations in groups of 16, 64 and 256 alone: what they lack is
    applied before them and rounded to the dtype of ``x``.
    """
    from comfy_kitchen.registry import registry

    values = x if smooth is None else x.float() / smooth
    if rotation is not None and rotation not in KITCHEN_GROUPS:
        values, rotation = rotate(values.float(), rotation), None
    arguments = {
        "x": values.to(x.dtype),
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None if bias is None else bias.to(x.dtype),
        "out_dtype": x.dtype,
        "convrot": rotation is not None,
        "convrot_groupsize": rotation or 256,
    }
    return registry.get_implementation("int8_linear", kitchen_backend(), arguments)(**arguments)


def int_mm_gemm(
    q: Tensor,
    scale_x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.int8_gemm`` with ``torch._int_mm``; the weight is read in place."""
    m, n = q.shape[0], weight.shape[0]
    product = _int_mm(q, weight) if m and n else q.new_empty((m, n), dtype=torch.int32)
    tile = max(1, tile_values(q.device) // max(n, 1))
    if m <= tile:
        return reference.scale_product(product, scale_x, weight_scale, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=q.device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        out[rows] = reference.scale_product(
            product[rows], scale_x[rows], weight_scale, bias, out_dtype
        )
    return out


def quantize_rows_in_tiles(
    x: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.smooth_rotate_quantize_rows``, a few rows at a time: on a CPU 3 to 4 x faster."""
    rows = x.reshape(-1, x.shape[-1])
    return _in_tiles(reference.smooth_rotate_quantize_rows, (rows,), smooth, rotation)


def swiglu_in_tiles(
    gate: Tensor, up: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.swiglu_quantize_rows``, a few rows at a time."""
    rows = tuple(t.reshape(-1, t.shape[-1]) for t in (gate, up))
    return _in_tiles(reference.swiglu_quantize_rows, rows, smooth, rotation)


def _in_tiles(
    quantize: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], *tail: object
) -> tuple[Tensor, Tensor]:
    """``quantize(*inputs, *tail)`` for inputs ``[M, K]``, a few rows at a time."""
    m, k = inputs[0].shape
    tile = max(1, tile_values(inputs[0].device) // max(k, 1))
    if m <= tile or not k:
        return quantize(*inputs, *tail)
    q = torch.empty((m, k), dtype=torch.int8, device=inputs[0].device)
    scale = torch.empty(m, dtype=torch.float32, device=inputs[0].device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        q[rows], scale[rows] = quantize(*(t[rows] for t in inputs), *tail)
    return q, scale


def _int_mm(q: Tensor, weight: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return padded_int_mm(q, weight)
    if q.shape[1] == 1:  # torch 2.13 and 2.14 return unwritten memory here
        return q.int() * weight.t().int()
    return torch._int_mm(q, weight.t())


def padded_int_mm(q: Tensor, weight: Tensor) -> Tensor:
    """For cuBLASLt, which takes more than 16 rows, and K and N in multiples of 8."""
    m, k = q.shape
    n = weight.shape[0]
    if k % 8 or n % 8:
        _warn_padded(n, k)
        weight = torch.nn.functional.pad(weight, (0, -k % 8, 0, -n % 8))
    if k % 8 or m < 32:
        q = torch.nn.functional.pad(q, (0, -k % 8, 0, max(0, 32 - m)))
    return torch._int_mm(q, weight.t())[:m, :n]


@cache
def _warn_padded(n: int, k: int) -> None:
    logger.warning(
        "torch._int_mm needs in_features and out_features in multiples of 8: a weight of %d x %d "
        "is copied at every call",
        n,
        k,
    )
