"""Int8 products of other libraries under the signatures of ``ops.reference``."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from . import reference

logger = logging.getLogger(__name__)

# Epilogue values at a time: an int32 tile and its fp32 copy stay in a CPU's cache, and off one
# they bound the memory beside the output.
_EPILOGUE_TILE = {"cpu": 1 << 17}
_EPILOGUE_TILE_DEVICE = 1 << 26


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

    They know no smoothing: it is applied before them and rounded to the dtype of ``x``.
    """
    from comfy_kitchen.registry import registry

    arguments = {
        "x": x if smooth is None else (x.float() / smooth).to(x.dtype),
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None if bias is None else bias.to(x.dtype),
        "out_dtype": x.dtype,
        "convrot": rotation is not None,
        "convrot_groupsize": rotation or 256,
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
    tile = max(1, _EPILOGUE_TILE.get(q.device.type, _EPILOGUE_TILE_DEVICE) // max(n, 1))
    if m <= tile:
        return reference.scale_product(product, scale_x, weight_scale, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=q.device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        out[rows] = reference.scale_product(
            product[rows], scale_x[rows], weight_scale, bias, out_dtype
        )
    return out


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
