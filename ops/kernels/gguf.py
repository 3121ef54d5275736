"""GGUF blocks to rotated per-channel int8 in one pass: weights stay packed in memory.

One program decodes one output channel into registers, rotates it, takes its absmax and stores int8:
what int8_gemm then reads. The fp32 weight never exists in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import OpError
from .. import reference
from . import launch
from .gguf_decode import decode
from .primitives import absmax, row_scale, store_int8, store_row
from .rows import smooth_rotate_quantize_rows

__all__ = ["dequantize_rotate_quantize"]

PACKED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""Formats that the kernel decodes; floats are rows already."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@triton.jit
def dequantize_rotate_quantize_kernel(
    bytes_ptr,  # uint8 [N, row bytes]
    q_ptr,  # int8 [N, K]
    scale_ptr,  # fp32 [N]
    stride_bytes,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """``quantize_rows(R(dequantize(blocks)))``."""
    row = tl.program_id(0).to(tl.int64)
    bytes_ptr += row * stride_bytes
    q_ptr += row * K
    head = decode(bytes_ptr, 0, K, HEAD, FORMAT, ROTATION)
    peak = absmax(head)
    tail = head
    if TAIL > 0:
        tail = decode(bytes_ptr, HEAD, K, TAIL, FORMAT, ROTATION)
        peak = tl.maximum(peak, absmax(tail))
    store_row(q_ptr, scale_ptr, row, peak, head, tail, K, HEAD, TAIL)


@triton.jit
def dequantize_long_rows_kernel(
    bytes_ptr,  # uint8 [N, row bytes]
    q_ptr,  # int8 [N, K]
    scale_ptr,  # fp32 [N]
    stride_bytes,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """The same for rows that no register file holds: decodes each row twice."""
    row = tl.program_id(0).to(tl.int64)
    bytes_ptr += row * stride_bytes
    q_ptr += row * K
    peak = 0.0
    for start in range(0, K, BLOCK):
        peak = tl.maximum(peak, absmax(decode(bytes_ptr, start, K, BLOCK, FORMAT, ROTATION)))
    scale, inverse, keep = row_scale(peak)
    for start in range(0, K, BLOCK):
        y = decode(bytes_ptr, start, K, BLOCK, FORMAT, ROTATION)
        store_int8(q_ptr, y, inverse, keep, start, K, K % BLOCK != 0, BLOCK)
    tl.store(scale_ptr + row, scale)


def dequantize_rotate_quantize(
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int],
    rotation: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(R(dequantize(blocks)))``: GGUF blocks to per-channel int8.

    ``blocks uint8 [N, row_bytes]`` of format ``qtype``, ``shape (N, K)`` -> ``q int8 [N, K]``,
    ``scale fp32 [N]``. Raises OpError for bytes that do not make the shape.
    """
    n, k = shape
    if not launch.rotates("dequantize_rotate_quantize", k, rotation):
        return reference.dequantize_rotate_quantize(blocks, qtype, shape, rotation)
    if qtype in _FLOATS:
        rows = block_rows(blocks, n, _FLOATS[qtype].itemsize * k).view(_FLOATS[qtype])
        return smooth_rotate_quantize_rows(rows, None, rotation)
    if qtype not in PACKED:
        launch.log_fallback(f"dequantize_rotate_quantize of {qtype}", k)
        return reference.dequantize_rotate_quantize(blocks, qtype, shape, rotation)
    from ..blocks import FORMATS

    rows = block_rows(blocks, n, FORMATS[qtype].row_bytes(k))
    q, scale = launch.int8_rows(n, k, blocks.device)
    if n == 0:
        return q, scale
    arguments = (rows, q, scale, rows.stride(0))
    steps = {"FORMAT": qtype, "ROTATION": rotation or 0}
    with launch.on_device(blocks):
        kernels = dequantize_rotate_quantize_kernel, dequantize_long_rows_kernel
        launch.each_row(n, k, kernels, *arguments, **steps)
    return q, scale


def block_rows(blocks: Tensor, n: int, row_bytes: int) -> Tensor:
    """``blocks`` as contiguous uint8 ``[n, row_bytes]`` at an even address."""
    if blocks.dtype != torch.uint8 or blocks.numel() != n * row_bytes:
        raise OpError(
            "GGUF data does not make the shape",
            found=f"{blocks.numel()} values of {blocks.dtype}",
            needed=f"{n} rows of {row_bytes} bytes",
        )
    rows = blocks.reshape(n, row_bytes).contiguous()
    # A view as wider numbers needs their alignment; only a cut-out buffer lacks it.
    return rows if rows.storage_offset() % 4 == 0 else rows.clone()
