"""W8A8 matrix product on the INT8 tensor cores, with scales and bias in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import OpError
from .. import reference
from ..tuning import choices
from . import launch
from .configs import GemmConfig, gemm_candidates, shape_class

__all__ = ["int8_gemm"]


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of this program: GROUP_M tiles of rows share the columns of B that lie in L2."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    return first_m + in_group % group_m, in_group // group_m


@triton.jit
def int8_gemm_kernel(
    a_ptr,  # int8 [M, K]
    b_ptr,  # int8 [N, K]
    c_ptr,  # [M, N]
    scale_a_ptr,  # fp32 [M]
    scale_b_ptr,  # fp32 [N]
    bias_ptr,  # [N], read where HAS_BIAS
    M,
    N,
    K,  # a multiple of BLOCK_K
    stride_a,
    stride_b,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``C = (A @ B.T) * scale_a[:, None] * scale_b + bias``.

    Two products an iteration, each BLOCK_K / 2 deep: with a single one Triton 3.8 and 3.9 carry the
    int8 operands across the loop on sm_8x and spill.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, HALF)
    # Rows beyond the edge wrap around: the loop needs no masks, the store has them.
    a = a_ptr + (rows % M)[:, None].to(tl.int64) * stride_a + depth[None, :]
    b = b_ptr + (cols % N)[None, :].to(tl.int64) * stride_b + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for _ in range(0, K // BLOCK_K):
        a0 = tl.load(a)
        b0 = tl.load(b)
        a1 = tl.load(a + HALF)
        b1 = tl.load(b + HALF)
        acc = tl.dot(a0, b0, acc, out_dtype=tl.int32)
        acc = tl.dot(a1, b1, acc, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K

    in_m = rows < M
    in_n = cols < N
    scale_a = tl.load(scale_a_ptr + rows, mask=in_m, other=0.0)
    scale_b = tl.load(scale_b_ptr + cols, mask=in_n, other=0.0)
    c = acc.to(tl.float32) * scale_a[:, None] * scale_b[None, :]
    if HAS_BIAS:
        c += tl.load(bias_ptr + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out = c_ptr + rows[:, None].to(tl.int64) * stride_c + cols[None, :]
    tl.store(out, c.to(c_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def int8_gemm(
    q: Tensor,
    scale_x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    config: GemmConfig | None = None,
) -> Tensor:
    """``(q @ weight.T) * scale_x * weight_scale + bias``: exact int32 sums, fp32 epilogue, a cast.

    ``q int8 [M, K]``, ``scale_x fp32 [M]``, ``weight int8 [N, K]``, ``weight_scale fp32 [N]`` or
    ``[N, 1]``, ``bias [N]`` or None -> ``[M, N]`` in ``out_dtype``. ``config`` overrides the tile
    that was measured as fastest at load, else the first in the table of ``configs.py``. K that no
    tile divides runs the formula in torch, logged once. Raises OpError for shapes, dtypes or
    devices that do not fit together.
    """
    _check(q, scale_x, weight, weight_scale, bias)
    m, k = q.shape
    n = weight.shape[0]
    if config is None:
        config = _tile(m, n, k, q.device)
    if config is None or k % config.block_k:
        launch.log_fallback("int8_gemm", k)
        return reference.int8_gemm(q, scale_x, weight, weight_scale, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=q.device)
    if m == 0 or n == 0:
        return out
    q = q if q.stride(1) == 1 else q.contiguous()
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with launch.on_device(q):
        int8_gemm_kernel[(tiles,)](
            q,
            weight,
            out,
            scale_x.contiguous(),
            weight_scale.reshape(n).contiguous(),
            out if bias is None else bias.contiguous(),
            m,
            n,
            k,
            q.stride(0),
            weight.stride(0),
            out.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            HAS_BIAS=bias is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def _tile(m: int, n: int, k: int, device: torch.device) -> GemmConfig | None:
    """The fastest measured tile for the shape, else the table's first; None where none fits."""
    candidates = gemm_candidates(launch.architecture(device), m, k)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    found = choices.table(device).nearest(choices.TILE, n, k, m, None, shape_class(m))
    by_name = {str(tile): tile for tile in candidates}
    ranking = () if found is None else found.ranking
    return next((by_name[name] for name in ranking if name in by_name), candidates[0])


def _check(
    q: Tensor, scale_x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    if q.dtype != torch.int8 or weight.dtype != torch.int8:
        raise OpError("int8_gemm multiplies int8", found=f"{q.dtype} and {weight.dtype}")
    if q.dim() != 2 or weight.dim() != 2 or q.shape[1] != weight.shape[1]:
        raise OpError(
            "int8_gemm needs q [M, K] and weight [N, K]",
            found=f"{tuple(q.shape)} and {tuple(weight.shape)}",
        )
    # A copy of a weight at every call would cost more than it saves.
    if weight.stride(1) != 1:
        raise OpError(
            "the weight's columns are not adjacent",
            found=f"strides {weight.stride()}",
            needed="stride 1 along in_features",
            hint="Store the weight contiguous, [out_features, in_features].",
        )
    _check_vector(scale_x, "scale_x", q.shape[0], q)
    _check_vector(weight_scale, "weight_scale", weight.shape[0], q)
    launch.check_same_device(weight, "weight", q, "q")
    if scale_x.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        raise OpError("scales are fp32", found=f"{scale_x.dtype} and {weight_scale.dtype}")
    if bias is not None:
        _check_vector(bias, "bias", weight.shape[0], q)


def _check_vector(values: Tensor, name: str, length: int, like: Tensor) -> None:
    if values.numel() != length:
        raise OpError(f"{name} does not fit", found=tuple(values.shape), needed=f"[{length}]")
    launch.check_same_device(values, name, like, "q")
