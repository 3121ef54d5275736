"""INT4 as stock ComfyUI multiplies it on a card with INT4 units: activations of 4 bits too.

This pack multiplies the same weights with activations of 8 bits; the table has both.
"""

from __future__ import annotations

from comfy_kitchen.tensor.base import QuantizedTensor, register_layout_class
from torch import Tensor

from ...ops.layouts import W4A4Layout, Weight
from ...ops.linear import LinearOptions


class StockInt4Layout(W4A4Layout):
    """W4A4Layout, multiplied by comfy-kitchen's own op; on a CPU that is its eager one."""

    NAME = "Ideogram4QuantStockInt4"

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """``x @ weight.T + bias``."""
        return cls.kitchen_linear(x, weight, bias)

    @classmethod
    def input_recipe(cls, *_: object) -> None:
        """Values: comfy-kitchen rounds them itself."""
        return None


register_layout_class(StockInt4Layout.NAME, StockInt4Layout)


def as_stock(weight: QuantizedTensor) -> QuantizedTensor:
    """An INT4 weight, multiplied as stock does."""
    return Weight(weight._qdata, StockInt4Layout.NAME, weight._params)
