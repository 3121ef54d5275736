"""GGUF blocks to floats in one pass: what dense levels, text encoders and patched weights read.

A program takes a run of weights, wherever rows end: its blocks are read from memory once (codes
that share a byte meet in the cache) and its weights written once, so that the bytes moved are the
packed ones and the result's. In torch each format is a dozen or more launches with fp32 copies
between them. Products and sums are rounded apart (no fused multiply-add), as in the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..probes import checked, kept
from . import launch
from .configs import DECODED
from .gguf import PACKED, block_rows
from .gguf_decode import decode

__all__ = ["dequantize"]

log = logging.getLogger(__name__)


@triton.jit
def dequantize_kernel(
    bytes_ptr,  # uint8 [total / block size, type size]
    out_ptr,  # [total]
    total,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """``out = dequantize(bytes)``."""
    program = tl.program_id(0).to(tl.int64)
    left = total - program * BLOCK
    y = decode(bytes_ptr + program * BLOCK_BYTES, 0, left, BLOCK, FORMAT, 0)
    cols = tl.arange(0, BLOCK)
    out_ptr += program * BLOCK
    tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=cols < left)


def dequantize(
    blocks: Tensor, qtype: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights ``[*shape]`` of packed blocks in ``dtype``, bit for bit those of ``ops.blocks``.

    ``blocks`` uint8 of any shape, the bytes of a tensor of ``shape`` -> decoded in fp32, rounded
    once to bf16, fp16 or fp32. Other dtypes, the plain floats, and a device on which the kernel
    gives other bits (tried once, said in the log) run the formula. Raises OpError for bytes that
    do not make the shape.
    """
    known = qtype in PACKED and dtype in launch.FLOATS
    if not known or not _as_formula(qtype, blocks.device):
        return reference.dequantize(blocks, qtype, shape, dtype)
    from ..blocks import FORMATS

    fmt = FORMATS[qtype]
    n = fmt.nbytes(shape) // fmt.type_size
    return _launch(block_rows(blocks, n, fmt.type_size), qtype, dtype).view(*shape)


def _launch(blocks: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    """[n blocks, block size] of ``blocks`` uint8 [n blocks, type size], contiguous."""
    from ..blocks import FORMATS

    fmt = FORMATS[qtype]
    out = torch.empty((len(blocks), fmt.block_size), dtype=dtype, device=blocks.device)
    if not len(blocks):
        return out
    with launch.on_device(blocks):
        dequantize_kernel[(triton.cdiv(out.numel(), DECODED.head),)](
            blocks,
            out,
            out.numel(),
            BLOCK=DECODED.head,
            BLOCK_BYTES=DECODED.head // fmt.block_size * fmt.type_size,
            FORMAT=qtype,
            num_warps=DECODED.num_warps,
            enable_fp_fusion=False,
        )
    return out


@kept
def _as_formula(qtype: str, device: torch.device) -> bool:
    """Whether the kernel gives the formula's bits on ``device``, on any bytes."""
    from ..blocks import FORMATS

    fmt = FORMATS[qtype]
    generator = torch.Generator().manual_seed(0)
    count = DECODED.head // fmt.block_size + 3
    sample = torch.randint(0, 256, (count, fmt.type_size), dtype=torch.uint8, generator=generator)
    wanted = reference.dequantize(sample, qtype, (count, fmt.block_size))
    try:
        found = _launch(sample.to(device), qtype, torch.float32).cpu()
    except Exception as error:  # whatever compilers, linkers and drivers come up with
        problem = f"{type(error).__name__}: {str(error).strip()[:300]}"
    else:
        same = torch.equal(found.nan_to_num(), wanted.nan_to_num())
        problem = "" if same and torch.equal(found.isnan(), wanted.isnan()) else "other values"
    if problem:
        log.warning("%s is decoded by torch on %s, slower: its kernel: %s", qtype, device, problem)
    return checked(not problem, problem)
