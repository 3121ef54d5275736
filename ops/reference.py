"""Every op as a formula in torch: what the kernels must compute, and the fallback everywhere.

M tokens, N out_features, K in_features. Activations are fp32, fp16 or bf16; all arithmetic is fp32,
products of int8 are summed exactly in int32, scales are fp32. A row of activations that holds a NaN
or an infinity has scale NaN and q = 0: its outputs are NaN, other rows are untouched, and nobody
has to ask the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OpError
from .chunks import CACHED, row_chunks
from .rotation import rotate

__all__ = [
    "SCALE_FLOOR",
    "dequantize",
    "dequantize_rotate_quantize",
    "gate_residual_rmsnorm",
    "gguf_linear",
    "int8_gemm",
    "int8_linear",
    "int32_product",
    "quantize_rows",
    "rms_rope",
    "rmsnorm_scale_quantize_rows",
    "rotate",
    "smooth_rotate_quantize_rows",
    "swiglu_quantize_rows",
]

SCALE_FLOOR = 1e-30
"""Smallest scale of a row, as in comfy-kitchen: a row of zeros divides by this, not by zero."""

# 128 * 128 * 1024 = 2^24: sums of int8 products this long are exact in fp32, in any order.
_EXACT_K = 1024


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``scale = max(absmax(x) / 127, 1e-30)``, ``q = round_half_even(x / scale)``, a row at a time.

    ``x [..., K]`` -> ``q int8 [M, K]`` in -127..127 and ``scale fp32 [M]``, M the product of the
    leading dimensions. Rows that are not finite: ``q = 0``, ``scale = NaN``.
    """
    if x.shape[-1] == 0:
        raise OpError("cannot quantize rows without values", found=f"shape {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]).float()
    absmax = rows.abs().amax(dim=1)
    scale = (absmax / 127.0).clamp_min(SCALE_FLOOR)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    q = torch.nan_to_num(rows / scale[:, None], nan=0.0).round_().clamp_(-127.0, 127.0)
    return q.to(torch.int8), scale


def int32_product(q: Tensor, weight: Tensor) -> Tensor:
    """``q @ weight.T`` exactly: int8 ``[M, K]`` and int8 ``[N, K]`` -> int32 ``[M, N]``.

    Runs on any device: fp32 products over runs of K short enough to be exact.
    """
    total = torch.zeros((q.shape[0], weight.shape[0]), dtype=torch.int32, device=q.device)
    for a, b in zip(q.split(_EXACT_K, dim=1), weight.split(_EXACT_K, dim=1), strict=True):
        total += (a.float() @ b.float().t()).to(torch.int32)
    return total


def int8_gemm(
    q: Tensor,
    scale_x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``(q @ weight.T) * scale_x * weight_scale + bias``: exact int32 sums, fp32 epilogue, a cast.

    ``q int8 [M, K]``, ``scale_x fp32 [M]``, ``weight int8 [N, K]``, ``weight_scale fp32 [N]`` or
    ``[N, 1]``, ``bias [N]`` or None -> ``[M, N]`` in ``out_dtype``.
    """
    return scale_product(int32_product(q, weight), scale_x, weight_scale, bias, out_dtype)


def scale_product(
    product: Tensor,
    scale_x: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``product * scale_x * weight_scale + bias`` in fp32, cast to ``out_dtype``: the epilogue.

    ``product int32 [M, N]``; the rest as in ``int8_gemm``.
    """
    out = product.float()  # [M, N]
    out *= scale_x.reshape(-1, 1)
    out *= weight_scale.reshape(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """``quantize(R(x / smooth)) @ weight.T * scales + bias``: dynamic W8A8, per token and channel.

    ``x [..., K]``, ``weight int8 [N, K]`` holding ``round(R(W * smooth) / weight_scale)``,
    ``weight_scale fp32 [N]`` or ``[N, 1]``, ``smooth [K]``, ``rotation`` the group of the rotation
    R -> ``[..., N]`` in the dtype of ``x``.
    """
    q, scale_x = smooth_rotate_quantize_rows(x, smooth, rotation)
    out = int8_gemm(q, scale_x, weight, weight_scale, bias, x.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def smooth_rotate_quantize_rows(
    x: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(x / smooth))``: ``x [..., K]`` -> ``q int8 [M, K]``, ``scale fp32 [M]``.

    ``smooth [K]`` divides (SmoothQuant); ``rotation`` is a group, a power of 4.
    """
    values = x.float()
    if smooth is not None:
        values = values / smooth.float()
    if rotation is not None:
        values = rotate(values, rotation)
    return quantize_rows(values)


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
    multiplies, so ``1 + adaln``) -> ``q int8 [M, K]``, ``scale fp32 [M]``.
    """
    values = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps) * scale.float()
    return smooth_rotate_quantize_rows(values, smooth, rotation)


def swiglu_quantize_rows(
    gate: Tensor, up: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(silu(gate) * up / smooth))``: both ``[..., K]`` -> ``[M, K]``, ``[M]``."""
    return smooth_rotate_quantize_rows(F.silu(gate.float()) * up.float(), smooth, rotation)


def gate_residual_rmsnorm(x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x + gate * (y / sqrt(mean(y^2) + eps) * weight)`` in fp32, cast once to the dtype of ``x``.

    ``x`` and ``y`` ``[..., K]``, ``weight [K]``, ``gate`` broadcastable to ``x``.
    """
    normed = F.rms_norm(y.float(), (y.shape[-1],), weight.float(), eps)
    return (x.float() + gate.float() * normed).to(x.dtype)


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

    ``q`` and ``k`` ``[B, L, H, D]``, weights ``[D]``, ``cos`` and ``sin`` broadcastable to ``[B, L,
    D / 2]`` -> both contiguous ``[B, L, H, D]``; fp32 between, cast once to the dtype of ``q``.
    diffusers and ComfyUI round to the dtype after the norm too.
    """
    return _rms_rope(q, q_weight, cos, sin, eps), _rms_rope(k, k_weight, cos, sin, eps)


def _rms_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)
    low, high = normed.chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)  # [B, L, 1, D / 2]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def dequantize(
    blocks: Tensor, qtype: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights ``[*shape]`` of GGUF blocks, decoded in fp32 and rounded once to ``dtype``."""
    from .blocks import dequantize as decode

    return decode(blocks, qtype, shape, dtype)


def dequantize_rotate_quantize(
    blocks: Tensor, qtype: str, shape: tuple[int, int], rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(dequantize(blocks)))``: GGUF blocks to per-channel int8.

    ``blocks uint8 [N, row_bytes]`` of format ``qtype``, ``shape (N, K)`` -> ``q int8 [N, K]``,
    ``scale fp32 [N]``. Rows are decoded a few at a time; the fp32 weight never exists whole.
    """
    from .blocks import dequantize

    n, k = shape
    q = torch.empty((n, k), dtype=torch.int8, device=blocks.device)
    scale = torch.empty(n, dtype=torch.float32, device=blocks.device)
    for rows in row_chunks((n, k), values=CACHED):
        values = dequantize(blocks[rows], qtype, (rows.stop - rows.start, k))
        q[rows], scale[rows] = smooth_rotate_quantize_rows(values, None, rotation)
    return q, scale


def gguf_linear(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    compute: str = "w8a8",
    rotation: int | None = 256,
) -> Tensor:
    """``x @ dequantize(blocks).T + bias``: through int8 (``"w8a8"``) or in x's dtype (``"dense"``).

    ``x [..., K]``, ``blocks uint8 [N, row_bytes]``, ``shape (N, K)`` -> ``[..., N]`` in the dtype
    of ``x``. ``rotation`` is used by ``"w8a8"`` alone, on both sides.
    """
    from .blocks import dequantize

    if compute == "dense":
        weight = dequantize(blocks, qtype, shape, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if compute != "w8a8":
        raise OpError("unknown compute mode", found=repr(compute), needed="'w8a8' or 'dense'")
    q, scale = dequantize_rotate_quantize(blocks, qtype, shape, rotation)
    return int8_linear(x, q, scale, bias, rotation=rotation)
