"""RMSNorm of the heads of q and k and their rotary embedding in one pass.

A program takes a few heads, wherever tokens end. q and k are read once where they lie, strided
views of what the qkv linear wrote, and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import OpError
from .. import reference
from . import launch
from .configs import MAX_HEAD, ROPE_ROWS, ROPE_WARPS

__all__ = ["rms_rope"]


@triton.jit
def _norm_and_turn(
    x_ptr, weight_ptr, out_ptr, cos, sin, at, row, mask, pair, eps, HALF: tl.constexpr
):
    """Heads at ``x_ptr + at`` -> rows ``row`` of the output; ``pair`` and what it masks [1, W]."""
    low = tl.load(x_ptr + at + pair, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + at + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(low * low + high * high, axis=1)
    factor = (1.0 / tl.sqrt(square / (2 * HALF) + eps))[:, None]
    inside = pair < HALF
    low *= factor * tl.load(weight_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    high *= factor * tl.load(weight_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    out_ptr += row * (2 * HALF) + pair
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr, (low * cos - high * sin).to(kind), mask=mask)
    tl.store(out_ptr + HALF, (high * cos + low * sin).to(kind), mask=mask)


@triton.jit
def rms_rope_kernel(
    q_ptr,  # [B, L, H, 2 HALF]
    k_ptr,
    q_weight_ptr,  # [2 HALF]
    k_weight_ptr,
    cos_ptr,  # fp32 [B, L, HALF]
    sin_ptr,
    q_out_ptr,  # [B, L, H, 2 HALF], contiguous
    k_out_ptr,
    rows,  # B * L * H
    length,  # L
    heads,  # H
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_table_batch,
    stride_table_token,
    stride_table_pair,
    eps,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """q where the second index of the program is 0, else k."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    pair = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (pair < HALF)
    token = row // heads
    head = (row - token * heads).to(tl.int64)
    batch = token // length
    token = (token - batch * length).to(tl.int64)
    batch = batch.to(tl.int64)
    row = row.to(tl.int64)

    table = batch * stride_table_batch + token * stride_table_token + pair * stride_table_pair
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    if tl.program_id(1) == 0:
        at = batch * stride_q_batch + token * stride_q_token + head * stride_q_head
        _norm_and_turn(q_ptr, q_weight_ptr, q_out_ptr, cos, sin, at, row, mask, pair, eps, HALF)
    else:
        at = batch * stride_k_batch + token * stride_k_token + head * stride_k_head
        _norm_and_turn(k_ptr, k_weight_ptr, k_out_ptr, cos, sin, at, row, mask, pair, eps, HALF)


def rms_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head, then of its halves ``(a, b) -> (a cos - b sin, b cos + a sin)``.

    ``q`` and ``k`` ``[B, L, H, D]`` of any strides with adjacent values of a head, weights ``[D]``,
    ``cos`` and ``sin`` broadcastable to ``[B, L, D / 2]``, of any strides -> both contiguous. Heads
    of more than 1024 values run the formula in torch, logged once. Raises OpError for shapes,
    dtypes or devices that do not fit together.
    """
    _check(q, k)
    batch, length, heads, d = q.shape
    if d > MAX_HEAD:
        launch.log_fallback("rms_rope", d)
        return reference.rms_rope(q, k, q_weight, k_weight, cos, sin, eps)
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    weights = [launch.vector(w, "a head's norm", d, q) for w in (q_weight, k_weight)]
    cos, sin = (_table(t, (batch, length, d // 2), q) for t in (cos, sin))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = [torch.empty(q.shape, dtype=t.dtype, device=t.device) for t in (q, k)]
    rows = batch * length * heads
    if rows == 0:
        return tuple(out)
    with launch.on_device(q):
        rms_rope_kernel[(triton.cdiv(rows, ROPE_ROWS), 2)](
            q,
            k,
            *weights,
            cos,
            sin,
            *out,
            rows,
            length,
            heads,
            *q.stride()[:3],
            *k.stride()[:3],
            *cos.stride(),
            eps,
            HALF=d // 2,
            WIDTH=max(triton.next_power_of_2(d // 2), 16),
            ROWS=ROPE_ROWS,
            num_warps=ROPE_WARPS,
        )
    return tuple(out)


def _check(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or q.shape[3] == 0 or q.shape[3] % 2:
        raise OpError("q is no matrix of heads", found=tuple(q.shape), needed="[B, L, H, even D]")
    launch.check_same_shape(q, "q", k, "k")
    if q.dtype not in launch.FLOATS or k.dtype != q.dtype:
        raise OpError(
            "q and k have dtypes the kernels do not take",
            found=f"{q.dtype} and {k.dtype}",
            needed=f"one of {launch.FLOATS}",
        )


def _table(values: Tensor, shape: tuple[int, int, int], q: Tensor) -> Tensor:
    """``values`` in fp32 as a view of ``shape``; OpError where they do not broadcast to it."""
    launch.check_same_device(values, "the rotary table", q, "q")
    try:
        return values.float().expand(shape)
    except RuntimeError:
        raise OpError(
            "the rotary table does not fit the heads", found=tuple(values.shape), needed=list(shape)
        ) from None
