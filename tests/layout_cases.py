"""A weight in every layout, and whether two are the same to the bit."""

from __future__ import annotations

import torch

from ideogram4_quant.ops.layouts import QuantizedTensor
from ideogram4_quant.ops.layouts.packed import SIX_BITS

INT8, GGUF, FP8, NF4 = (f"Ideogram4Quant{name}" for name in ("Int8", "GGUF", "FP8", "NF4"))
FOLDED_INT8, FOLDED_GGUF = "Ideogram4QuantFoldedInt8", "Ideogram4QuantFoldedGGUF"
W4A8, W4A4, NVFP4, MXFP8, AWQ = (
    f"Ideogram4Quant{name}" for name in ("W4A8", "W4A4", "NVFP4", "MXFP8", "AWQ")
)
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
    "w4a8": (W4A8, {}, 0.0800),
    "w4a8 groups of 32": (W4A8, {"group_size": 32, "scale_dtype": torch.float32}, 0.0900),
    "w4a8 uniform": (W4A8, {"codebook": False}, 0.1000),
    "w4a8 zeros": (W4A8, {"symmetric": False}, 0.0900),
    "w6a8": (W4A8, {"bits": 6}, 0.0280),
    "w4a4": (W4A4, {}, 0.1600),
    "nvfp4": (NVFP4, {}, 0.1100),
    "mxfp8": (MXFP8, {}, 0.0330),
    "fp8 e5m2": (FP8, {"dtype": torch.float8_e5m2}, 0.0560),
    "awq": (AWQ, {}, 0.1100),
}
if not SIX_BITS:  # made by the formula then, less well: ``test_layout_stock.py`` says how
    del KINDS["w6a8"]
ROUNDED_TWICE = (
    "w4a8",
    "w6a8",
    "nvfp4",
    "awq",
)  # comfy-kitchen decodes in the dtype that is asked for
SHARED = ("nf4 across rows", "nvfp4", "mxfp8")  # rows share scales: they are not cut out
GROUPED = {  # layouts that pack whole groups of columns
    **dict.fromkeys((W4A8, W4A4), 256),
    AWQ: 64,
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
        and all(
            torch.equal(bits(getattr(a._params, n)), bits(getattr(b._params, n))) for n in names
        )
    )


def bits(tensor):
    """Something that torch compares: it has no equality of float8."""
    small = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.view(torch.uint8) if small else tensor
