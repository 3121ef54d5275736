"""The systems of the table: how each stores the linears of the blocks, as data.

All of them quantize the same 24 linears a copy (those in the blocks) and leave the 7 of the stem in
bf16, so that rows differ by the treatment alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ...checkpoint.canonical import is_linear
from ...ops.layouts import FP8Layout, GGUFLayout, Int8Layout, NF4Layout, int8_tensor
from ...ops.reference import dequantize_rotate_quantize
from ...quant.recipes import BLOCK_LINEARS

REFERENCE = "BF16"
ROTATION = 256
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")

Store = Callable[[Tensor], QuantizedTensor]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    ``store`` makes a quantized weight from the fp32 one (None: it stays in bf16); ``compute`` says
    how GGUF weights are multiplied; with ``stress`` the row is made at stress strength too.
    """

    name: str
    store: Store | None = None
    compute: str = "dense"
    stress: bool = False


def _stored(layout: str, **options: object) -> Store:
    return lambda weight: QuantizedTensor.from_float(weight, layout, **options)


SCHEMES: tuple[Scheme, ...] = (
    Scheme(REFERENCE, stress=True),
    Scheme("W8A8", _stored(Int8Layout.NAME), stress=True),
    Scheme("W8A8 rotated", _stored(Int8Layout.NAME, rotation=ROTATION), stress=True),
    Scheme("FP8 per row", _stored(FP8Layout.NAME, per_row=True)),
    Scheme("FP8 per tensor", _stored(FP8Layout.NAME, per_row=False)),
    Scheme("NF4", _stored(NF4Layout.NAME)),
    *(Scheme(t, _stored(GGUFLayout.NAME, qtype=t)) for t in GGUF_TYPES),
    *(Scheme(f"{t} as W8A8", _stored(GGUFLayout.NAME, qtype=t), "w8a8") for t in ("Q8_0", "Q4_K")),
)


def is_block_linear(name: str) -> bool:
    """Whether the canonical tensor ``name`` is one that all systems quantize."""
    return is_linear(name) and fnmatchcase(name, BLOCK_LINEARS)


def weights(scheme: Scheme, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One copy's tensors, bf16 [N, K] in, as ``scheme`` stores them."""
    if scheme.store is None:
        return state
    return {
        name: scheme.store(tensor.float()) if is_block_linear(name) else tensor
        for name, tensor in state.items()
    }


def unpacked(tensors: dict[str, Tensor], compute: str) -> dict[str, Tensor]:
    """The tensors in the form in which they are multiplied, unpacked once instead of at every call.

    What `ops.linear` does at each call with FP8, NF4 and GGUF weights, done before: they become
    fp32, or with ``compute`` "w8a8" rotated int8. The products are the same; a test compares them.
    """
    return {name: _unpacked(tensor, compute) for name, tensor in tensors.items()}


def _unpacked(tensor: Tensor, compute: str) -> Tensor:
    if not isinstance(tensor, QuantizedTensor) or tensor._layout_cls == Int8Layout.NAME:
        return tensor
    if compute == "dense":
        return tensor.dequantize()
    params = tensor._params
    q, scale = dequantize_rotate_quantize(
        tensor._qdata, params.qtype, params.matrix_shape, ROTATION
    )
    return int8_tensor(q, scale, dtype=torch.float32, rotation=ROTATION)
