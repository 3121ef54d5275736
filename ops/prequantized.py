"""The two halves of a W8A8 linear: quantize activations once, multiply them by several weights.

Custom ops, so that torch.compile traces through; a ``backend`` is ``"auto"`` or a name of
``dispatch.reports``. Formulas and shapes are those of ``ops.reference``. Rows are ``q int8 [M, K]``
with ``scale fp32 [M]``, M the product of the leading dimensions. Callers have checked the shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, reference
from .chunks import MULTIPLIED, row_chunks
from .library import define, needs_gradient

WHOLE_LAYERS_ONLY = ("comfy_kitchen",)
"""Backends whose linear quantizes inside: they have no halves."""


def quantize_rows(
    x: Tensor, smooth: Tensor | None, rotation: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """``reference.smooth_rotate_quantize_rows``."""
    return _quantize_rows_op(x, smooth, rotation or 0, backend)


def normed_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    smooth: Tensor | None,
    rotation: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``reference.rmsnorm_scale_quantize_rows``."""
    return _normed_rows_op(x, weight, scale, eps, smooth, rotation or 0, backend)


def normed_linear(
    x: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rotation: int | None,
    backend: str,
) -> Tensor:
    """``reference.int8_linear`` of ``RMSNorm(x) * norm_weight * scale``, by one whole linear.

    ``scale`` has K values: one modulation for all rows.
    """
    q = (weight, weight_scale, bias, rotation or 0, backend)
    return _normed_linear_op(x, norm_weight, scale, eps, *q)


def gated_rows(
    gate: Tensor, up: Tensor, smooth: Tensor | None, rotation: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """``reference.swiglu_quantize_rows``."""
    return _gated_rows_op(gate, up, smooth, rotation or 0, backend)


def gate_residual_rmsnorm(
    x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, eps: float, backend: str
) -> Tensor:
    """``reference.gate_residual_rmsnorm``."""
    return _gate_residual_op(x, gate, y, weight, eps, backend)


def rms_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``reference.rms_rope``; the formula itself where a gradient is needed: kernels have none."""
    if needs_gradient(q, k, q_weight, k_weight):
        return reference.rms_rope(q, k, q_weight, k_weight, cos, sin, eps)
    return _rms_rope_op(q, k, q_weight, k_weight, cos, sin, eps, backend)


def int8_product(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """``reference.int8_gemm``: rows against ``weight int8 [N, K]`` -> ``[M, N]`` in ``dtype``."""
    return _int8_product_op(q, scale, weight, weight_scale, bias, dtype, backend)


def gguf_product(
    q: Tensor,
    scale: Tensor,
    blocks: Tensor,
    qtype: str,
    bias: Tensor | None,
    rotation: int | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Rows, rotated by ``rotation``, against GGUF ``blocks`` [N, row bytes] -> ``[M, N]``.

    The decoded weight lives for one call: on a GPU in memory that its caching allocator hands to
    the next layer, on a CPU a few output channels at a time.
    """
    return _gguf_product_op(q, scale, blocks, qtype, bias, rotation or 0, dtype, backend)


# ---- implementations behind the custom ops


def _choose(op: str, x: Tensor, n: int, backend: str, dtype: torch.dtype | None = None) -> Callable:
    shape = (x.numel() // x.shape[-1], n, x.shape[-1])
    return dispatch.choose(op, shape, x.device, backend, dtype=dtype).get(op)


def _quantize_rows(x, smooth, rotation, backend):
    run = _choose("smooth_rotate_quantize_rows", x, x.shape[-1], backend)
    return run(x, smooth, rotation or None)


def _normed_rows(x, weight, scale, eps, smooth, rotation, backend):
    run = _choose("rmsnorm_scale_quantize_rows", x, x.shape[-1], backend)
    return run(x, weight, scale, eps, smooth, rotation or None)


def _normed_linear(x, norm_weight, scale, eps, weight, weight_scale, bias, rotation, backend):
    n, k = weight.shape
    shape = (x.numel() // k, n, k)
    more = {"dtype": x.dtype, "rotation": rotation}
    chosen = dispatch.choose("int8_linear", shape, x.device, backend, **more)
    operands = (weight, weight_scale.reshape(-1), bias)
    whole = chosen.ops.get("normed_int8_linear")
    if whole is not None:
        return whole(x, norm_weight, scale, eps, *operands, rotation or None)
    rows = chosen.get("rmsnorm_scale_quantize_rows")
    q, scale_x = rows(x, norm_weight, scale, eps, None, rotation or None)
    out = _int8_product(q, scale_x, *operands, x.dtype, backend)
    return out.reshape(*x.shape[:-1], n)


def _gated_rows(gate, up, smooth, rotation, backend):
    run = _choose("swiglu_quantize_rows", gate, gate.shape[-1], backend)
    return run(gate, up, smooth, rotation or None)


def _gate_residual(x, gate, y, weight, eps, backend):
    return _choose("gate_residual_rmsnorm", x, x.shape[-1], backend)(x, gate, y, weight, eps)


def _rms_rope(q, k, q_weight, k_weight, cos, sin, eps, backend):
    run = _choose("rms_rope", q, q.shape[-1], backend, q.dtype)
    return run(q, k, q_weight, k_weight, cos, sin, eps)


def _int8_product(q, scale, weight, weight_scale, bias, dtype, backend):
    gemm = _choose("int8_gemm", q, weight.shape[0], backend, dtype)
    return gemm(q, scale, weight.contiguous(), weight_scale.reshape(-1), bias, dtype)


def _gguf_product(q, scale, blocks, qtype, bias, rotation, dtype, backend):
    n, (m, k) = blocks.shape[0], q.shape
    decode = _choose("dequantize_rotate_quantize", q, n, backend)
    gemm = _choose("int8_gemm", q, n, backend, dtype)
    if q.device.type != "cpu":
        weight, weight_scale = decode(blocks, qtype, (n, k), rotation or None)
        return gemm(q, scale, weight, weight_scale, bias, dtype)
    out = torch.empty((m, n), dtype=dtype)
    for rows in row_chunks((n, k), values=MULTIPLIED):
        shape = (rows.stop - rows.start, k)
        weight, weight_scale = decode(blocks[rows], qtype, shape, rotation or None)
        part = None if bias is None else bias[rows]
        out[:, rows] = gemm(q, scale, weight, weight_scale, part, dtype)
    return out


def _rows_fake(x, *_):
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    return x.new_empty((m, k), dtype=torch.int8), x.new_empty((m,), dtype=torch.float32)


def _normed_linear_fake(x, norm_weight, scale, eps, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _gate_residual_fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_rope_fake(q, k, *_):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))


def _int8_product_fake(q, scale, weight, weight_scale, bias, dtype, backend):
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=dtype)


def _gguf_product_fake(q, scale, blocks, qtype, bias, rotation, dtype, backend):
    return q.new_empty((q.shape[0], blocks.shape[0]), dtype=dtype)


_ROWS = "Tensor? smooth, int rotation, str backend) -> (Tensor, Tensor)"
_quantize_rows_op = define("quantize_rows", f"(Tensor x, {_ROWS}", _quantize_rows, _rows_fake)
_normed_rows_op = define(
    "normed_rows",
    f"(Tensor x, Tensor weight, Tensor scale, float eps, {_ROWS}",
    _normed_rows,
    _rows_fake,
)
_normed_linear_op = define(
    "normed_linear",
    "(Tensor x, Tensor norm_weight, Tensor scale, float eps, Tensor weight, Tensor weight_scale,"
    " Tensor? bias, int rotation, str backend) -> Tensor",
    _normed_linear,
    _normed_linear_fake,
)
_gated_rows_op = define("gated_rows", f"(Tensor gate, Tensor up, {_ROWS}", _gated_rows, _rows_fake)
_gate_residual_op = define(
    "gate_residual_rmsnorm",
    "(Tensor x, Tensor gate, Tensor y, Tensor weight, float eps, str backend) -> Tensor",
    _gate_residual,
    _gate_residual_fake,
)
_rms_rope_op = define(
    "rms_rope",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps,"
    " str backend) -> (Tensor, Tensor)",
    _rms_rope,
    _rms_rope_fake,
)
_int8_product_op = define(
    "int8_product",
    "(Tensor q, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype,"
    " str backend) -> Tensor",
    _int8_product,
    _int8_product_fake,
)
_gguf_product_op = define(
    "gguf_product",
    "(Tensor q, Tensor scale, Tensor blocks, str qtype, Tensor? bias, int rotation,"
    " ScalarType dtype, str backend) -> Tensor",
    _gguf_product,
    _gguf_product_fake,
)
