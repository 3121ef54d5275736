"""Packed 4- and 6-bit codes to the int8 grid that ``int8_gemm`` reads; see ``ops/grouped.py``.

A pass over the weight that reads half a byte (or three quarters) and a share of a scale a weight
and writes one. No row statistics: each program decodes a run of columns of one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import OpError
from ..grouped import bits_of
from . import launch
from .primitives import ROUND_MAGIC

__all__ = ["int8_grid"]

GRID_BLOCK = 2048  # columns of a program: 16 a thread
GRID_WARPS = 4


@triton.jit
def _e4m3(byte):
    """A finite e4m3 number, not negative or negative, in fp32: its bits are those of an fp16 whose
    exponent is 8 lower. Architectures before sm_89 have no conversion of their own.
    """
    half = (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.uint16)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def int8_grid_kernel(
    packed_ptr,  # uint8 [N, row bytes]
    s_rel_ptr,  # uint8 (e4m3) or fp32 [N, K / GROUP], read where GROUP
    codebook_ptr,  # fp32 [16], read where HAS_CODEBOOK
    out_ptr,  # int8 [N, K]
    stride_packed,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # 0: signed nibbles, which are the grid
    SIX_BITS: tl.constexpr,
    HAS_CODEBOOK: tl.constexpr,
    E4M3_SCALES: tl.constexpr,
):
    """``clamp(round_half_even(level * s_rel), -127, 127)``."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < K
    row_ptr = packed_ptr + row * stride_packed
    code = tl.load(row_ptr + cols // 2, mask=mask, other=0).to(tl.int32)
    code = (code >> (4 * (cols % 2))) & 15
    if GROUP == 0:
        grid = ((code << 28) >> 28).to(tl.int8)
    else:
        if SIX_BITS:
            high = tl.load(row_ptr + K // 2 + cols // 4, mask=mask, other=0).to(tl.int32)
            code |= ((high >> (2 * (cols % 4))) & 3) << 4
        if HAS_CODEBOOK:
            level = tl.load(codebook_ptr + code)
        else:
            CENTRE: tl.constexpr = 32 if SIX_BITS else 8
            level = (code - CENTRE).to(tl.float32)
        at = row * (K // GROUP) + cols // GROUP
        scale = tl.load(s_rel_ptr + at, mask=mask, other=0)
        scale = _e4m3(scale.to(tl.int32)) if E4M3_SCALES else scale.to(tl.float32)
        value = tl.minimum(tl.maximum(level * scale, -127.0), 127.0)
        grid = (value + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(out_ptr + row * K + cols, grid, mask=mask)


def int8_grid(packed: Tensor, s_rel: Tensor | None, codebook: Tensor | None, group: int) -> Tensor:
    """The int8 grid ``[N, K]`` of a packed weight: see ``ops.grouped.int8_grid``.

    ``packed int8 [N, row bytes]``, ``s_rel [N, K / group]`` e4m3 or fp32 or None, ``codebook fp32
    [16]`` or None. Raises OpError for sizes and dtypes that do not fit each other.
    """
    n = packed.shape[0]
    k = 2 * packed.shape[1] if s_rel is None else s_rel.shape[1] * group
    _check(packed, s_rel, codebook)
    bits = bits_of(packed.shape[1], k)
    out = torch.empty((n, k), dtype=torch.int8, device=packed.device)
    if n == 0:
        return out
    rows = packed.contiguous().view(torch.uint8)
    e4m3 = s_rel is not None and s_rel.dtype == torch.float8_e4m3fn
    factors = rows if s_rel is None else s_rel.contiguous()
    factors = factors.view(torch.uint8) if e4m3 else factors
    table = factors if codebook is None else codebook.float().contiguous()
    with launch.on_device(packed):
        int8_grid_kernel[(n, triton.cdiv(k, GRID_BLOCK))](
            rows,
            factors,
            table,
            out,
            rows.stride(0),
            K=k,
            BLOCK=GRID_BLOCK,
            GROUP=0 if s_rel is None else group,
            SIX_BITS=bits == 6,
            HAS_CODEBOOK=codebook is not None,
            E4M3_SCALES=e4m3,
            num_warps=GRID_WARPS,
        )
    return out


def _check(packed: Tensor, s_rel: Tensor | None, codebook: Tensor | None) -> None:
    if packed.dim() != 2 or packed.dtype not in (torch.int8, torch.uint8):
        raise OpError(
            "packed codes are an int8 matrix", found=f"{packed.dtype} {tuple(packed.shape)}"
        )
    if s_rel is None:
        return
    launch.check_same_device(s_rel, "s_rel", packed, "the codes")
    if s_rel.dtype not in (torch.float8_e4m3fn, torch.float32) or len(s_rel) != len(packed):
        raise OpError(
            "the group scales do not fit the codes",
            found=f"{s_rel.dtype} {tuple(s_rel.shape)}",
            needed=f"float8_e4m3fn or float32 [{len(packed)}, groups]",
        )
    if codebook is not None:
        launch.check_same_device(codebook, "the codebook", packed, "the codes")
