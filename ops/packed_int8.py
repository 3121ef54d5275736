"""Linears on weights that are packed below 8 bits and lie on an int8 grid: W4A8, W6A8, W4A4's.

Activations are quantized to int8 rows as for an INT8 weight; the weight is decoded to its grid for
the call, on a CPU a few output channels at a time, and multiplied as int8. Custom ops, so that
torch.compile traces through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, prequantized
from .chunks import MULTIPLIED, row_chunks
from .grouped import int8_grid
from .library import define


def packed_product(
    q: Tensor,
    scale: Tensor,
    packed: Tensor,
    s_rel: Tensor | None,
    s_channel: Tensor,
    codebook: Tensor | None,
    group: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """``(q * scale) @ (int8_grid(packed) * s_channel).T + bias`` -> ``[M, N]`` in ``dtype``.

    Rows ``q int8 [M, K]``, ``scale fp32 [M]``, rotated as the weight is; ``packed`` and the rest as
    in ``ops.grouped``, ``s_channel fp32 [N]``.
    """
    return _packed_product_op(
        q, scale, packed, s_rel, s_channel, codebook, group, bias, dtype, backend
    )


def packed_linear(
    x: Tensor,
    packed: Tensor,
    s_rel: Tensor | None,
    s_channel: Tensor,
    codebook: Tensor | None,
    group: int,
    bias: Tensor | None,
    rotation: int | None,
    backend: str,
) -> Tensor:
    """``packed_product`` of the rows of ``x [..., K]``, rotated and quantized to int8."""
    q, scale = prequantized.quantize_rows(x, None, rotation, backend)
    out = packed_product(
        q, scale, packed, s_rel, s_channel, codebook, group, bias, x.dtype, backend
    )
    return out.reshape(*x.shape[:-1], packed.shape[0])


def _packed_product(q, scale, packed, s_rel, s_channel, codebook, group, bias, dtype, backend):
    n, (m, k) = packed.shape[0], q.shape
    shape = (m, n, k)
    gemm = dispatch.choose("int8_gemm", shape, q.device, backend, dtype=dtype).get("int8_gemm")
    if q.device.type != "cpu":
        decode = _decoder(shape, q.device, backend)
        weight = decode(packed, s_rel, codebook, group)
        return gemm(q, scale, weight, s_channel, bias, dtype)
    out = torch.empty((m, n), dtype=dtype)
    for rows in row_chunks((n, k), values=MULTIPLIED):
        factors = None if s_rel is None else s_rel[rows]
        weight = int8_grid(packed[rows], factors, codebook, group)
        part = None if bias is None else bias[rows]
        out[:, rows] = gemm(q, scale, weight, s_channel[rows], part, dtype)
    return out


def _decoder(shape, device, backend):
    # comfy-kitchen multiplies but does not decode to our order: the best decoder serves it.
    asked = dispatch.AUTO if backend == "comfy_kitchen" else backend
    return dispatch.choose("int8_grid", shape, device, asked).get("int8_grid")


def _packed_product_fake(q, scale, packed, s_rel, s_channel, codebook, group, bias, dtype, backend):
    return q.new_empty((q.shape[0], packed.shape[0]), dtype=dtype)


_packed_product_op = define(
    "packed_product",
    "(Tensor q, Tensor scale, Tensor packed, Tensor? s_rel, Tensor s_channel, Tensor? codebook,"
    " int group, Tensor? bias, ScalarType dtype, str backend) -> Tensor",
    _packed_product,
    _packed_product_fake,
)
