"""Per-token int8 in one pass over a row: with smoothing and rotation, and with SwiGLU before them.

One program a row; the row stays in registers from the only read to the only write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import adapters
from . import launch
from .primitives import absmax, columns, load, row_scale, smooth_rotate, store_int8, store_row

__all__ = ["quantize_rows", "smooth_rotate_quantize_rows", "swiglu_quantize_rows"]


@triton.jit
def _swiglu_or_plain(x_ptr, up_ptr, cols, K, PADDED: tl.constexpr, SWIGLU: tl.constexpr):
    y = load(x_ptr, cols, K, PADDED)
    if SWIGLU:
        y = y / (1.0 + tl.exp(-y)) * load(up_ptr, cols, K, PADDED)
    return y


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K], the gate where SWIGLU
    up_ptr,  # [M, K], read where SWIGLU
    smooth_ptr,  # [K], read where HAS_SMOOTH
    q_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    stride_x,
    stride_up,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """``quantize_rows(R(y / smooth))`` with y either x or ``silu(x) * up``."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    up_ptr += row * stride_up
    q_ptr += row * K

    cols = columns(HEAD, ROTATION)
    head = _swiglu_or_plain(x_ptr, up_ptr, cols, K, HEAD > K, SWIGLU)
    head = smooth_rotate(head, cols, smooth_ptr, K, HEAD > K, HEAD, HAS_SMOOTH, ROTATION)
    peak = absmax(head)
    tail = head
    if TAIL > 0:
        cols = HEAD + columns(TAIL, ROTATION)
        tail = _swiglu_or_plain(x_ptr, up_ptr, cols, K, HEAD + TAIL > K, SWIGLU)
        tail = smooth_rotate(tail, cols, smooth_ptr, K, HEAD + TAIL > K, TAIL, HAS_SMOOTH, ROTATION)
        peak = tl.maximum(peak, absmax(tail))

    store_row(q_ptr, scale_ptr, row, peak, head, tail, K, HEAD, TAIL)


@triton.jit
def quantize_long_rows_kernel(
    x_ptr,  # [M, K], the gate where SWIGLU
    up_ptr,  # [M, K], read where SWIGLU
    smooth_ptr,  # [K], read where HAS_SMOOTH
    q_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    stride_x,
    stride_up,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """``quantize_rows_kernel`` for rows that no register file holds: walks the row twice."""
    PADDED: tl.constexpr = K % BLOCK != 0
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    up_ptr += row * stride_up
    q_ptr += row * K

    peak = 0.0
    for start in range(0, K, BLOCK):
        cols = start + columns(BLOCK, ROTATION)
        y = _swiglu_or_plain(x_ptr, up_ptr, cols, K, PADDED, SWIGLU)
        y = smooth_rotate(y, cols, smooth_ptr, K, PADDED, BLOCK, HAS_SMOOTH, ROTATION)
        peak = tl.maximum(peak, absmax(y))
    scale, inverse, keep = row_scale(peak)
    for start in range(0, K, BLOCK):
        cols = start + columns(BLOCK, ROTATION)
        y = _swiglu_or_plain(x_ptr, up_ptr, cols, K, PADDED, SWIGLU)
        y = smooth_rotate(y, cols, smooth_ptr, K, PADDED, BLOCK, HAS_SMOOTH, ROTATION)
        store_int8(q_ptr, y, inverse, keep, start, K, PADDED, BLOCK)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``scale = max(absmax(x) / 127, 1e-30)``, ``q = round_half_even(x / scale)``, a row at a time.

    ``x [..., K]`` -> ``q int8 [M, K]``, ``scale fp32 [M]``; a row that is not finite gets
    ``q = 0``, ``scale = NaN``. Raises OpError for a dtype or a K that the kernel cannot take.
    """
    return _launch(x, None, None, None)


def smooth_rotate_quantize_rows(
    x: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(x / smooth))``: ``x [..., K]`` -> ``q int8 [M, K]``, ``scale fp32 [M]``."""
    if not launch.rotates("smooth_rotate_quantize_rows", x.shape[-1], rotation):
        return adapters.quantize_rows_in_tiles(x, smooth, rotation)
    return _launch(x, None, smooth, rotation)


def swiglu_quantize_rows(
    gate: Tensor, up: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(silu(gate) * up / smooth))``: both ``[..., K]`` -> ``[M, K]``, ``[M]``."""
    launch.check_same_shape(gate, "gate", up, "up")
    if not launch.rotates("swiglu_quantize_rows", gate.shape[-1], rotation):
        return adapters.swiglu_in_tiles(gate, up, smooth, rotation)
    return _launch(gate, up, smooth, rotation)


def _launch(
    x: Tensor, up: Tensor | None, smooth: Tensor | None, rotation: int | None
) -> tuple[Tensor, Tensor]:
    rows = launch.rows_of(x, "x")
    up_rows = rows if up is None else launch.rows_of(up, "up")
    m, k = rows.shape
    smooth = launch.vector(smooth, "smooth", k, x)
    q, scale = launch.int8_rows(m, k, x.device)
    if m == 0:
        return q, scale
    arguments = (
        rows,
        up_rows,
        rows if smooth is None else smooth,
        q,
        scale,
        rows.stride(0),
        up_rows.stride(0),
    )
    steps = {"SWIGLU": up is not None, "HAS_SMOOTH": smooth is not None, "ROTATION": rotation or 0}
    with launch.on_device(x):
        kernels = quantize_rows_kernel, quantize_long_rows_kernel
        launch.each_row(m, k, kernels, *arguments, **steps)
    return q, scale
