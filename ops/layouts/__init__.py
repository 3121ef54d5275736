"""Layouts of comfy-kitchen's ``QuantizedTensor``: INT8, GGUF blocks, FP8, NF4, and folded ones.

Importing this registers them under the names below. ``dequantize()`` is the true weight in original
coordinates; ``w[a:b]`` and ``split`` over rows stay quantized; ``F.linear(x, w)`` runs what
``ops.linear.linear`` runs with its default options. Arithmetic in place quantizes the result again.
"""

from comfy_kitchen.tensor.base import QuantizedTensor, register_layout_class

from .aten import register_handlers
from .base import Layout
from .folded import FoldedGGUFLayout, FoldedInt8Layout, folded_tensor
from .fp8 import FP8Layout, fp8_tensor
from .gguf import GGUFLayout, gguf_tensor
from .int8 import Int8Layout, int8_tensor
from .nf4 import NF4Layout, nf4_tensor
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
    )
}

for _name, _layout in LAYOUTS.items():
    register_layout_class(_name, _layout)
    register_handlers(_layout)

__all__ = [
    "LAYOUTS",
    "FP8Layout",
    "FoldedGGUFLayout",
    "FoldedInt8Layout",
    "GGUFLayout",
    "Int8Layout",
    "Layout",
    "NF4Layout",
    "QuantizedTensor",
    "Weight",
    "folded_tensor",
    "fp8_tensor",
    "gguf_tensor",
    "int8_tensor",
    "nf4_tensor",
]
