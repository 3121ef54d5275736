"""RMSNorm fused with what follows it: modulation and int8, or the gated residual.

One program a row; the row stays in registers from the only read to the only write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import launch
from .configs import MAX_ROW, row_blocks
from .primitives import absmax, columns, load, smooth_rotate, store_row

__all__ = ["gate_residual_rmsnorm", "rmsnorm_scale_quantize_rows"]


@triton.jit
def rmsnorm_scale_quantize_rows_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [K]
    modulation_ptr,  # [M / rows_per_modulation, K]
    smooth_ptr,  # [K], read where HAS_SMOOTH
    q_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    stride_x,
    stride_modulation,
    rows_per_modulation,
    eps,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """``quantize_rows(R(x / sqrt(mean(x^2) + eps) * weight * modulation / smooth))``."""
    row = tl.program_id(0)
    modulation_ptr += (row // rows_per_modulation).to(tl.int64) * stride_modulation
    row = row.to(tl.int64)
    x_ptr += row * stride_x
    q_ptr += row * K

    head_cols = columns(HEAD, ROTATION)
    head = load(x_ptr, head_cols, K, HEAD > K)
    square = tl.sum(head * head, axis=0)
    if TAIL > 0:
        tail_cols = HEAD + columns(TAIL, ROTATION)
        tail = load(x_ptr, tail_cols, K, HEAD + TAIL > K)
        square += tl.sum(tail * tail, axis=0)
    factor = 1.0 / tl.sqrt(square / K + eps)

    head *= factor * load(weight_ptr, head_cols, K, HEAD > K)
    head *= load(modulation_ptr, head_cols, K, HEAD > K)
    head = smooth_rotate(head, head_cols, smooth_ptr, K, HEAD > K, HEAD, HAS_SMOOTH, ROTATION)
    peak = absmax(head)
    if TAIL > 0:
        PADDED: tl.constexpr = HEAD + TAIL > K
        tail *= factor * load(weight_ptr, tail_cols, K, PADDED)
        tail *= load(modulation_ptr, tail_cols, K, PADDED)
        tail = smooth_rotate(tail, tail_cols, smooth_ptr, K, PADDED, TAIL, HAS_SMOOTH, ROTATION)
        peak = tl.maximum(peak, absmax(tail))
    else:
        tail = head
    store_row(q_ptr, scale_ptr, row, peak, head, tail, K, HEAD, TAIL)


@triton.jit
def _store_gated_residual(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    normed,
    START: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = START + tl.arange(0, BLOCK)
    normed *= load(weight_ptr, cols, K, PADDED)
    out = load(x_ptr, cols, K, PADDED) + load(gate_ptr, cols, K, PADDED) * normed
    if PADDED:
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=cols < K)
    else:
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty))


@triton.jit
def gate_residual_rmsnorm_kernel(
    x_ptr,  # [M, K]
    gate_ptr,  # [M / rows_per_gate, K]
    y_ptr,  # [M, K]
    weight_ptr,  # [K]
    out_ptr,  # [M, K]
    stride_x,
    stride_gate,
    stride_y,
    rows_per_gate,
    eps,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """``x + gate * (y / sqrt(mean(y^2) + eps) * weight)``."""
    row = tl.program_id(0)
    gate_ptr += (row // rows_per_gate).to(tl.int64) * stride_gate
    row = row.to(tl.int64)
    x_ptr += row * stride_x
    y_ptr += row * stride_y
    out_ptr += row * K

    head = load(y_ptr, tl.arange(0, HEAD), K, HEAD > K)
    square = tl.sum(head * head, axis=0)
    if TAIL > 0:
        tail = load(y_ptr, HEAD + tl.arange(0, TAIL), K, HEAD + TAIL > K)
        square += tl.sum(tail * tail, axis=0)
    factor = 1.0 / tl.sqrt(square / K + eps)

    _store_gated_residual(x_ptr, gate_ptr, weight_ptr, out_ptr, head * factor, 0, K, HEAD > K, HEAD)
    if TAIL > 0:
        _store_gated_residual(
            x_ptr, gate_ptr, weight_ptr, out_ptr, tail * factor, HEAD, K, HEAD + TAIL > K, TAIL
        )


def rmsnorm_scale_quantize_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    smooth: Tensor | None = None,
    rotation: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(x / sqrt(mean(x^2) + eps) * weight * scale / smooth))``.

    ``x [..., K]``, ``weight [K]``, ``scale`` broadcastable to ``x`` (the modulation as it
    multiplies, so ``1 + adaln``) -> ``q int8 [M, K]``, ``scale fp32 [M]``. Raises OpError for
    shapes, dtypes or devices that do not fit together.
    """
    rows = launch.rows_of(x, "x")
    m, k = rows.shape
    if k > MAX_ROW:
        launch.log_fallback("rmsnorm_scale_quantize_rows", k)
    if k > MAX_ROW or not launch.rotates("rmsnorm_scale_quantize_rows", k, rotation):
        return reference.rmsnorm_scale_quantize_rows(x, weight, scale, eps, smooth, rotation)
    weight = launch.vector(weight, "weight", k, x)
    smooth = launch.vector(smooth, "smooth", k, x)
    modulation, stride_modulation, rows_per_modulation = launch.modulation(scale, "scale", x)
    q, row_scales = launch.int8_rows(m, k, x.device)
    if m == 0:
        return q, row_scales
    blocks, num_warps = row_blocks(k)
    with launch.on_device(x):
        rmsnorm_scale_quantize_rows_kernel[(m,)](
            rows,
            weight,
            modulation,
            weight if smooth is None else smooth,
            q,
            row_scales,
            rows.stride(0),
            stride_modulation,
            rows_per_modulation,
            eps,
            **blocks,
            HAS_SMOOTH=smooth is not None,
            ROTATION=rotation or 0,
            num_warps=num_warps,
        )
    return q, row_scales


def gate_residual_rmsnorm(x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x + gate * (y / sqrt(mean(y^2) + eps) * weight)`` in fp32, cast once to the dtype of ``x``.

    ``x`` and ``y`` ``[..., K]``, ``weight [K]``, ``gate`` broadcastable to ``x``. Raises OpError
    for shapes, dtypes or devices that do not fit together.
    """
    launch.check_same_shape(x, "x", y, "y")
    rows = launch.rows_of(x, "x")
    y_rows = launch.rows_of(y, "y")
    m, k = rows.shape
    if k > MAX_ROW:
        launch.log_fallback("gate_residual_rmsnorm", k)
        return reference.gate_residual_rmsnorm(x, gate, y, weight, eps)
    weight = launch.vector(weight, "weight", k, x)
    gates, stride_gate, rows_per_gate = launch.modulation(gate, "gate", x)
    out = torch.empty((m, k), dtype=x.dtype, device=x.device)
    if m == 0:
        return out.reshape(x.shape)
    blocks, num_warps = row_blocks(k)
    with launch.on_device(x):
        gate_residual_rmsnorm_kernel[(m,)](
            rows,
            gates,
            y_rows,
            weight,
            out,
            rows.stride(0),
            stride_gate,
            y_rows.stride(0),
            rows_per_gate,
            eps,
            **blocks,
            num_warps=num_warps,
        )
    return out.reshape(x.shape)
