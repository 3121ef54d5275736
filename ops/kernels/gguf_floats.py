"""GGUF blocks to floats in one pass: what dense levels, text encoders and patched weights read.

A program takes a run of weights, wherever rows end: its blocks are read from memory once (codes
that share a byte meet in the cache) and its weights written once, so that the bytes moved are the
packed ones and the result's. In torch each format is a dozen or more launches with fp32 copies
between them. Products and sums are rounded apart (no fused multiply-add), as in the formulas.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..probes import checked, kept
from . import launch
from .configs import DECODED
from .gguf_decode import decode

__all__ = ["dequantize", "dequantize_as_formula"]

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


def dequantize(blocks: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    """Weights [n blocks, block size] of ``blocks`` uint8 [n blocks, type size] in ``dtype``.

    Bit for bit those of ``ops.blocks``: decoded in fp32 and rounded once to bf16, fp16 or fp32.
    ``qtype`` is one of ``gguf.PACKED``, ``blocks`` is contiguous at an address that 4 divides.
    """
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
def dequantize_as_formula(qtype: str, device: torch.device) -> bool:
    """Whether the kernel gives the formula's bits on ``device``: tried once, on any bytes.

    A device where it does not, or does not compile, decodes in torch, and the log says why.
    """
    from ..blocks import FORMATS

    fmt = FORMATS[qtype]
    generator = torch.Generator().manual_seed(0)
    shape = (DECODED.head // fmt.block_size + 3, fmt.type_size)
    sample = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    wanted = torch.empty((len(sample), fmt.block_size))
    fmt.decode(sample, wanted)
    try:
        found = dequantize(sample.to(device), qtype, torch.float32).cpu()
    except Exception as error:  # whatever compilers, linkers and drivers come up with
        problem = f"{type(error).__name__}: {str(error).strip()[:300]}"
    else:
        same = torch.equal(found.nan_to_num(), wanted.nan_to_num())
        problem = "" if same and torch.equal(found.isnan(), wanted.isnan()) else "other values"
    if problem:
        log.warning("%s is decoded by torch on %s, slower: its kernel: %s", qtype, device, problem)
    return checked(not problem, problem)
