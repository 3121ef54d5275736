"""Layouts of comfy-kitchen's ``QuantizedTensor``: INT8, GGUF blocks, FP8, NF4, and folded ones.

Importing this registers them under the names below. ``dequantize()`` is the true weight in original
coordinates; ``w[a:b]`` and ``split`` over rows stay quantized; ``F.linear(x, w)`` runs what
``ops.linear.linear`` runs with its default options. Arithmetic in place quantizes the result again.
"""

from comfy_kitchen.tensor.base import QuantizedTensor, register_layout_class

from .aten import register_handlers
from .awq import AWQLayout, awq_tensor
from .base import Layout
from .folded import FoldedGGUFLayout, FoldedInt8Layout, folded_tensor
from .fp8 import FP8Layout, fp8_tensor
from .gguf import GGUFLayout, gguf_tensor
from .int8 import Int8Layout, int8_tensor
from .microscaled import MXFP8Layout, NVFP4Layout, mxfp8_tensor, nvfp4_tensor
from .nf4 import NF4Layout, nf4_tensor
from .packed import W4A4Layout, W4A8Layout
from .packed_tensors import w4a4_tensor, w4a8_tensor
from .weight import Weight

LAYOUTS: dict[str, type[Layout]] = {
    layout.NAME: layout
    for layout in (
        Int8Layout,
        GGUFLayout,
        FP8Layout,
        NF4Layout,
        FoldedInt8Layout,
        FoldedGGUFLayout,
        W4A8Layout,
        W4A4Layout,
        NVFP4Layout,
        MXFP8Layout,
        AWQLayout,
    )
}

for _name, _layout in LAYOUTS.items():
    register_layout_class(_name, _layout)
    register_handlers(_layout)

__all__ = [
    "LAYOUTS",
    "AWQLayout",
    "FP8Layout",
    "FoldedGGUFLayout",
    "FoldedInt8Layout",
    "GGUFLayout",
    "Int8Layout",
    "Layout",
    "MXFP8Layout",
    "NF4Layout",
    "NVFP4Layout",
    "QuantizedTensor",
    "W4A4Layout",
    "W4A8Layout",
    "Weight",
    "awq_tensor",
    "folded_tensor",
    "fp8_tensor",
    "gguf_tensor",
    "int8_tensor",
    "mxfp8_tensor",
    "nf4_tensor",
    "nvfp4_tensor",
    "w4a4_tensor",
    "w4a8_tensor",
]
