"""Hooks of comfy-kitchen 0.2.40: a linear with what comes before it inside its quantizer.

comfy-kitchen finds them by name on a layout and asks; NotImplemented means that the caller does the
parts. Older versions never ask.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from .. import prequantized
from ..linear import LinearOptions


class InputHooks:
    """For a layout with ``input_recipe`` and ``multiply_rows``."""

    @classmethod
    def linear_input_act(
        cls,
        weight: QuantizedTensor,
        x: Tensor,
        bias: Tensor | None = None,
        input_act: str | None = None,
        input_act_weight: Tensor | None = None,
        input_act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Any:
        """``residual + residual_scale * linear(act(x))`` with the activation in the quantizer.

        ``input_act``: None, ``"swiglu"`` (x holds gate and up side by side) or ``"rms_norm"``.
        NotImplemented for others, and for a weight that is not multiplied as int8.
        """
        k = x.shape[-1] // 2 if input_act == "swiglu" else x.shape[-1]
        recipe = cls._recipe(weight, x, k)
        if recipe is None:
            return NotImplemented
        tail = (*recipe, LinearOptions().backend)
        if input_act in (None, "none"):
            rows = prequantized.quantize_rows(x, *tail)
        elif input_act == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            rows = prequantized.gated_rows(gate, up, *tail)
        elif input_act == "rms_norm" and input_act_weight is not None:
            one = torch.ones((), device=x.device).expand(k)
            rows = prequantized.normed_rows(x, input_act_weight, one, input_act_eps, *tail)
        else:
            return NotImplemented
        out = cls._multiplied(rows, weight, bias, x)
        if residual is None:
            return out
        return torch.addcmul(residual.to(out.dtype), out, residual_scale.to(out.dtype))

    @classmethod
    def fused_rms_modulated(
        cls,
        x: Tensor,
        weight: QuantizedTensor,
        bias: Tensor | None,
        norm_weight: Tensor,
        norm_eps: float,
        modulation_scale: Tensor,
    ) -> Any:
        """``linear(RMSNorm(x) * norm_weight * (1 + modulation_scale))``, normed in the quantizer.

        NotImplemented unless ``modulation_scale`` is one row for all tokens, and for a weight that
        is not multiplied as int8.
        """
        k = x.shape[-1]
        recipe = cls._recipe(weight, x, k)
        if recipe is None or modulation_scale.numel() != k or norm_weight.numel() != k:
            return NotImplemented
        factor = 1.0 + modulation_scale.reshape(k).float()
        tail = (*recipe, LinearOptions().backend)
        rows = prequantized.normed_rows(x, norm_weight.reshape(k), factor, norm_eps, *tail)
        return cls._multiplied(rows, weight, bias, x)

    @classmethod
    def _recipe(
        cls, weight: QuantizedTensor, x: Tensor, k: int
    ) -> tuple[Tensor | None, int | None] | None:
        """Only plain calls: what is odd, or traced, goes the checked way through its parts."""
        if k != weight._params.matrix_shape[1] or not x.numel() or torch.compiler.is_compiling():
            return None
        return cls.input_recipe(weight, x.numel() // x.shape[-1], x.dtype, LinearOptions())

    @classmethod
    def _multiplied(
        cls, rows: tuple[Tensor, Tensor], weight: QuantizedTensor, bias: Tensor | None, x: Tensor
    ) -> Tensor:
        out = cls.multiply_rows(*rows, weight, bias, x.dtype, LinearOptions())
        return out.reshape(*x.shape[:-1], out.shape[1])
