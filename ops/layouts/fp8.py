"""FP8 e4m3, one scale a tensor or an output channel; computed through the dequantized weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from ..chunks import row_chunks
from ..reference import SCALE_FLOOR
from .base import (
    BaseParams,
    Layout,
    check_dtype,
    check_matrix,
    check_same_device,
    generator_for,
    uniform,
)
from .weight import Weight

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Exponent of the smallest normal number, and bits of the mantissa.
_MIN_EXPONENT, _MANTISSA = -6, 3


class FP8Layout(Layout):
    """``W = qdata * scale``: e4m3 ``[N, K]``."""

    NAME = "Ideogram4QuantFP8"
    ROW_FIELDS = ("scale",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale fp32 [N, 1]``, or ``[]`` for the whole tensor."""

        scale: Tensor

        @property
        def label(self) -> str:
            return "FP8" if self.scale.ndim else "FP8 scaled"

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        per_row: bool = True,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """``round(W / scale)``, ``scale = absmax / 448`` of each row or the tensor unless given.

        What overflows a given scale becomes +-448 of it, infinity too, whatever torch's own cast
        does (2.13 saturates on a CPU, ml_dtypes gives NaN); NaN stays NaN. Without a given scale
        nothing finite overflows, and infinity makes its row NaN: it has no scale.

        ``stochastic_rounding`` is a seed (0 or None: to nearest). The host's other keywords are
        accepted; ``tensor`` is never written to.
        """
        check_matrix(tensor, "e4m3")
        shape, device = tuple(tensor.shape), tensor.device
        if scale is None or isinstance(scale, str):
            absmax = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().amax()
            scale = (absmax.float() / E4M3_MAX).clamp_min(SCALE_FLOOR)
        scale = _shaped(torch.as_tensor(scale, dtype=torch.float32, device=device), shape[0])
        generator = generator_for(stochastic_rounding, device)
        qdata = torch.empty(shape, dtype=E4M3, device=device)
        for rows in row_chunks(shape, device):
            values = tensor[rows].float() / (scale if scale.dim() == 0 else scale[rows])
            if generator is not None:
                values = values + (uniform(values, generator) - 0.5) * _spacing(values)
            # A NaN stays one through the clamp and the cast.
            qdata[rows] = values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return qdata, cls.Params(orig_dtype=tensor.dtype, orig_shape=shape, scale=scale)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """``qdata * scale`` in ``orig_dtype``."""
        out = torch.empty(qdata.shape, dtype=params.orig_dtype, device=qdata.device)
        for rows in row_chunks(tuple(qdata.shape), qdata.device):
            scale = params.scale if params.scale.dim() == 0 else params.scale[rows]
            out[rows] = qdata[rows].float() * scale
        return out

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``float8_e4m3fn`` for one scale; it knows no scale a row."""
        return {"format": "ideogram4_quant_fp8" if params.scale.dim() else "float8_e4m3fn"}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep the granularity when a patched weight is quantized again."""
        return {"per_row": qtensor._params.scale.dim() > 0}


def fp8_tensor(data: Tensor, scale: Tensor, *, dtype: torch.dtype) -> QuantizedTensor:
    """A weight from e4m3 values: ``data [N, K]``, ``scale`` ``[]``, ``[1]``, ``[N]`` or ``[N, 1]``.

    ``dtype`` is what it dequantizes to. Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    if data.dtype != E4M3 or data.dim() != 2:
        raise OpError(
            "an FP8 weight is an e4m3 matrix",
            found=f"{data.dtype} {tuple(data.shape)}",
            needed=f"{E4M3} [N, K]",
        )
    n, k = data.shape
    check_same_device(data, scale=scale)
    if not scale.is_floating_point() or scale.numel() not in (1, n):
        raise OpError(
            "the scales do not fit the FP8 weight",
            found=f"{scale.dtype} {tuple(scale.shape)}",
            needed=f"floating point [], [{n}] or [{n}, 1]",
        )
    params = FP8Layout.Params(
        orig_dtype=dtype, orig_shape=(n, k), scale=_shaped(scale.float(), n).contiguous()
    )
    return Weight(data.contiguous(), FP8Layout.NAME, params)


def _shaped(scale: Tensor, n: int) -> Tensor:
    per_row = scale.numel() == n and (n > 1 or scale.dim() > 0)
    return scale.reshape(n, 1) if per_row else scale.reshape(())


def _spacing(values: Tensor) -> Tensor:
    """The distance between neighbouring e4m3 numbers around each value."""
    # frexp puts the mantissa in [0.5, 1), one power of two below e4m3's own.
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponent.clamp_min(_MIN_EXPONENT) - _MANTISSA)
