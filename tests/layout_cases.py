"""A weight in every layout, and whether two are the same to the bit."""

from __future__ import annotations

import torch

from ideogram4_quant.ops.layouts import QuantizedTensor

INT8, GGUF, FP8, NF4 = (f"Ideogram4Quant{name}" for name in ("Int8", "GGUF", "FP8", "NF4"))
FOLDED_INT8, FOLDED_GGUF = "Ideogram4QuantFoldedInt8", "Ideogram4QuantFoldedGGUF"
K = 512
SMOOTH = torch.rand(K, generator=torch.Generator().manual_seed(9)) + 0.5

# name: layout, its options, largest relative error of a gaussian weight
KINDS = {
    "int8": (INT8, {}, 0.0090),
    "int8 smooth": (INT8, {"smooth": SMOOTH}, 0.0110),
    "int8 rotated": (INT8, {"rotation": 256}, 0.0090),
    "int8 smooth rotated": (INT8, {"smooth": SMOOTH, "rotation": 64}, 0.0110),
    "Q8_0": (GGUF, {"qtype": "Q8_0"}, 0.0060),
    "Q4_K": (GGUF, {"qtype": "Q4_K"}, 0.0800),
    "Q2_K": (GGUF, {"qtype": "Q2_K"}, 0.2800),
    "IQ4_XS": (GGUF, {"qtype": "IQ4_XS"}, 0.0800),
    "MXFP4": (GGUF, {"qtype": "MXFP4"}, 0.1200),
    "F16": (GGUF, {"qtype": "F16"}, 0.0005),
    "fp8 row": (FP8, {}, 0.0280),
    "fp8 tensor": (FP8, {"per_row": False}, 0.0280),
    "nf4": (NF4, {}, 0.1000),
    "nf4 across rows": (NF4, {"block_size": 96}, 0.1000),
    "folded int8": (FOLDED_INT8, {"fold_smooth": SMOOTH, "fold_rotation": 64}, 0.0110),
    "folded int8 rotated": (FOLDED_INT8, {"fold_smooth": SMOOTH, "rotation": 256}, 0.0110),
    "folded Q8_0": (FOLDED_GGUF, {"fold_smooth": SMOOTH, "qtype": "Q8_0"}, 0.0080),
}
BLOCKS = (GGUF, FOLDED_GGUF)  # encoded to the least error: whole blocks, no stochastic rounding


def make(kind, weight, **more):
    layout, options, _ = KINDS[kind]
    return QuantizedTensor.from_float(weight, layout, **options, **more)


def identical(a, b):
    """Same layout, storage and parameters, to the bit."""
    same = a._layout_cls == b._layout_cls and a.dtype == b.dtype and a.shape == b.shape
    names = a._params._tensor_fields()
    return (
        same
        and names == b._params._tensor_fields()
        and torch.equal(a._qdata.view(torch.uint8), b._qdata.view(torch.uint8))
        and all(torch.equal(getattr(a._params, n), getattr(b._params, n)) for n in names)
    )
