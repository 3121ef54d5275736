"""Int8 products of other libraries under the signatures of ``ops.reference``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .chunks import tile_values
from .rotation import rotate

logger = logging.getLogger(__name__)

KITCHEN_GROUPS = (256, 64, 16)
"""Rotation groups of comfy-kitchen's int8 kernels."""


def kitchen_backend() -> str:
    """comfy-kitchen's name of the backend with its own kernels for this torch: CUDA or ROCm."""
    return "hip" if torch.version.hip else "cuda"


def comfy_kitchen_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """``reference.int8_linear`` by comfy-kitchen's CUDA or ROCm kernels; ``x [M, K]``.

    They know no smoothing, and rotations in groups of 16, 64 and 256 alone: what they lack is
    applied before them and rounded to the dtype of ``x``.
    """
    values = x if smooth is None else x.float() / smooth
    if rotation is not None and rotation not in KITCHEN_GROUPS:
        values, rotation = rotate(values.float(), rotation), None
    return _kitchen_linear(values.to(x.dtype), weight, weight_scale, bias, rotation)


def comfy_kitchen_normed_linear(
    x: Tensor,
    norm_weight: Tensor,
    scale: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rotation: int | None,
) -> Tensor:
    """``int8_linear`` of ``x / sqrt(mean(x^2) + eps) * norm_weight * scale``, the norm inside it.

    ``x [..., K]``, ``scale`` and ``norm_weight`` of K values -> ``[..., N]``. comfy-kitchen makes
    the norm in its quantizer where that rotates in groups of 256, and before it elsewhere; the two
    factors are one to it, rounded to the dtype of ``x``.
    """
    factors = (norm_weight.float().reshape(-1) * scale.float().reshape(-1)).to(x.dtype)
    norm = {"input_act": "rms_norm", "input_act_weight": factors, "input_act_eps": eps}
    return _kitchen_linear(x, weight, weight_scale, bias, rotation, **norm)


def kitchen_ops() -> dict[str, Callable]:
    """What this comfy-kitchen has of the ops: 0.2.40 makes a norm inside its int8 linear."""
    from comfy_kitchen.registry import registry

    ops = {"int8_linear": comfy_kitchen_linear}
    linear = registry.get_implementation("int8_linear", kitchen_backend())
    if "input_act_weight" in inspect.signature(linear).parameters:
        ops["normed_int8_linear"] = comfy_kitchen_normed_linear
        ops["gate_residual_rmsnorm"] = comfy_kitchen_residual
    return ops


def comfy_kitchen_residual(
    x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """``reference.gate_residual_rmsnorm`` by ROCm's kernel, else two passes in the dtype of ``x``.

    comfy-kitchen's CUDA backend has no such op. Rounded to the dtype after the norm, as unfused.
    """
    from comfy_kitchen.registry import registry

    weight, gate, y = (t.to(x.dtype) for t in (weight, gate, y))
    arguments = {"activation": y, "norm_weight": weight, "residual": x, "gate": gate, "eps": eps}
    if registry.validate_backend_for_call(kitchen_backend(), _RESIDUAL, arguments).success:
        return registry.get_implementation(_RESIDUAL, kitchen_backend())(**arguments)
    return torch.addcmul(x, gate, F.rms_norm(y, (y.shape[-1],), weight, eps))


_RESIDUAL = "rms_gated_residual"


def _kitchen_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rotation: int | None,
    **norm: object,
) -> Tensor:
    from comfy_kitchen.registry import registry

    arguments = {
        "x": x,
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None if bias is None else bias.to(x.dtype),
        "out_dtype": x.dtype,
        "convrot": rotation is not None,
        "convrot_groupsize": rotation or 256,
        **norm,
    }
    return registry.get_implementation("int8_linear", kitchen_backend(), arguments)(**arguments)


def int_mm_gemm(
    q: Tensor,
    scale_x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.int8_gemm`` with ``torch._int_mm``; the weight is read in place."""
    m, n = q.shape[0], weight.shape[0]
    product = _int_mm(q, weight) if m and n else q.new_empty((m, n), dtype=torch.int32)
    tile = max(1, tile_values(q.device) // max(n, 1))
    if m <= tile:
        return reference.scale_product(product, scale_x, weight_scale, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=q.device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        out[rows] = reference.scale_product(
            product[rows], scale_x[rows], weight_scale, bias, out_dtype
        )
    return out


def quantize_rows_in_tiles(
    x: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.smooth_rotate_quantize_rows``, a few rows at a time: on a CPU 3 to 4 x faster."""
    rows = x.reshape(-1, x.shape[-1])
    return _in_tiles(reference.smooth_rotate_quantize_rows, (rows,), smooth, rotation)


def swiglu_in_tiles(
    gate: Tensor, up: Tensor, smooth: Tensor | None = None, rotation: int | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.swiglu_quantize_rows``, a few rows at a time."""
    rows = tuple(t.reshape(-1, t.shape[-1]) for t in (gate, up))
    return _in_tiles(reference.swiglu_quantize_rows, rows, smooth, rotation)


def _in_tiles(
    quantize: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], *tail: object
) -> tuple[Tensor, Tensor]:
    """``quantize(*inputs, *tail)`` for inputs ``[M, K]``, a few rows at a time."""
    m, k = inputs[0].shape
    tile = max(1, tile_values(inputs[0].device) // max(k, 1))
    if m <= tile or not k:
        return quantize(*inputs, *tail)
    q = torch.empty((m, k), dtype=torch.int8, device=inputs[0].device)
    scale = torch.empty(m, dtype=torch.float32, device=inputs[0].device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        q[rows], scale[rows] = quantize(*(t[rows] for t in inputs), *tail)
    return q, scale


def _int_mm(q: Tensor, weight: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return padded_int_mm(q, weight)
    if q.shape[1] == 1:  # torch 2.13 and 2.14 return unwritten memory here
        return q.int() * weight.t().int()
    return torch._int_mm(q, weight.t())


def padded_int_mm(q: Tensor, weight: Tensor) -> Tensor:
    """For cuBLASLt, which takes more than 16 rows, and K and N in multiples of 8."""
    m, k = q.shape
    n = weight.shape[0]
    if k % 8 or n % 8:
        _warn_padded(n, k)
        weight = torch.nn.functional.pad(weight, (0, -k % 8, 0, -n % 8))
    if k % 8 or m < 32:
        q = torch.nn.functional.pad(q, (0, -k % 8, 0, max(0, 32 - m)))
    return torch._int_mm(q, weight.t())[:m, :n]


@cache
def _warn_padded(n: int, k: int) -> None:
    logger.warning(
        "torch._int_mm needs in_features and out_features in multiples of 8: a weight of %d x %d "
        "is copied at every call",
        n,
        k,
    )
