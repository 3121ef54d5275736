"""FP8, and int8 in blocks: computed through the dequantized weight.

One scale a tensor, an output channel or a block of rows and columns.
"""

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

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}
# Exponent of the smallest normal number, and bits of the mantissa.
_FORM = {E4M3: (-6, 3), E5M2: (-14, 2)}


class FP8Layout(Layout):
    """``W = qdata * scale``: e4m3, e5m2 or int8 ``[N, K]``."""

    NAME = "Ideogram4QuantFP8"
    ROW_FIELDS = ("scale",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale fp32 [N, 1]``, ``[]`` for the whole tensor, or ``[a, b]`` for blocks of N / a
        rows and K / b columns.
        """

        scale: Tensor

        @property
        def label(self) -> str:
            if self.scale.ndim == 0:
                return "FP8 scaled"
            return "FP8" if self.scale.shape[1] == 1 else "FP8 blocks"

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        per_row: bool = True,
        blocks: tuple[int, int] | None = None,
        dtype: torch.dtype = E4M3,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """``round(W / scale)``, ``scale = absmax / 448`` (e5m2 57344, int8 127) of each row, the
        tensor or each of ``blocks`` (rows, columns), unless given.

        ``stochastic_rounding`` is a seed (0 or None: to nearest). The host's other keywords are
        accepted; ``tensor`` is never written to.
        """
        check_matrix(tensor, "FP8")
        shape, device, largest = tuple(tensor.shape), tensor.device, LARGEST[dtype]
        blocks = blocks or ((1, shape[1]) if per_row else shape)
        if any(size % max(each, 1) for size, each in zip(shape, blocks, strict=True)):
            raise OpError(
                "blocks do not fill the weight", found=shape, needed=f"blocks of {blocks}"
            )
        if scale is None or isinstance(scale, str):
            scale = (_absmax(tensor, blocks) / largest).clamp_min(SCALE_FLOOR)
        scale = torch.as_tensor(scale, dtype=torch.float32, device=device)
        scale = _shaped(scale, shape, whole=blocks == shape)
        generator = generator_for(stochastic_rounding, device)
        qdata = torch.empty(shape, dtype=dtype, device=device)
        for rows in row_chunks(shape, device):
            values = tensor[rows].float() / _of_rows(scale, rows, shape)
            if generator is not None:
                values = values + (uniform(values, generator) - 0.5) * spacing(values, dtype)
            values = values if dtype.is_floating_point else values.round()
            # A NaN stays one through the clamp and the cast.
            qdata[rows] = values.clamp(-largest, largest).to(dtype)
        return qdata, cls.Params(orig_dtype=tensor.dtype, orig_shape=shape, scale=scale)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """``qdata * scale`` in ``orig_dtype``."""
        out = torch.empty(qdata.shape, dtype=params.orig_dtype, device=qdata.device)
        for rows in row_chunks(tuple(qdata.shape), qdata.device):
            out[rows] = qdata[rows].float() * _of_rows(params.scale, rows, params.matrix_shape)
        return out

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's format for one scale of e4m3 (``float8_e4m3fn``); the tensors tell the rest."""
        return {"format": "ideogram4_quant_fp8" if params.scale.dim() else "float8_e4m3fn"}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep format and granularity when a patched weight is quantized again."""
        params = qtensor._params
        kept = {"dtype": qtensor._qdata.dtype, "per_row": params.scale.dim() > 0}
        blocks = _blocks(params.scale, params.matrix_shape)
        return kept if blocks is None else {**kept, "blocks": blocks}

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        """Where a row has scales of its own, or all have one."""
        blocks = _blocks(params.scale, params.matrix_shape)
        return blocks is None or blocks[0] == 1


def fp8_tensor(data: Tensor, scale: Tensor, *, dtype: torch.dtype) -> QuantizedTensor:
    """A weight from e4m3, e5m2 or int8 values: ``data [N, K]``, ``scale`` ``[]``, ``[1]``, ``[N]``,
    ``[N, 1]`` or ``[a, b]`` of blocks of N / a rows and K / b columns.

    ``dtype`` is what it dequantizes to. Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    if data.dtype not in LARGEST or data.dim() != 2:
        raise OpError(
            "an FP8 weight is an e4m3 or e5m2 matrix, or one of int8 in blocks",
            found=f"{data.dtype} {tuple(data.shape)}",
            needed=f"{E4M3}, {E5M2} or {torch.int8} [N, K]",
        )
    n, k = data.shape
    check_same_device(data, scale=scale)
    whole_or_rows = scale.numel() in (1, n) and (scale.dim() < 2 or 1 in scale.shape)
    in_blocks = scale.dim() == 2 and 0 not in scale.shape
    in_blocks = in_blocks and n % scale.shape[0] == 0 and k % scale.shape[1] == 0
    whole_or_rows = whole_or_rows and data.dtype != torch.int8  # which has layouts of its own
    if not scale.is_floating_point() or not (whole_or_rows or in_blocks):
        raise OpError(
            "the scales do not fit the FP8 weight",
            found=f"{scale.dtype} {tuple(scale.shape)}",
            needed=f"floating point [], [{n}], [{n}, 1] or [a, b] of blocks of {n} x {k}",
        )
    params = FP8Layout.Params(
        orig_dtype=dtype, orig_shape=(n, k), scale=_shaped(scale.float(), (n, k)).contiguous()
    )
    return Weight(data.contiguous(), FP8Layout.NAME, params)


def _shaped(scale: Tensor, shape: tuple[int, int], whole: bool = False) -> Tensor:
    """As the parameters keep it; ``whole``: one scale of a matrix of one row is the tensor's."""
    n = shape[0]
    if scale.dim() == 2 and scale.shape[1] == 1 and scale.numel() not in (1, n):
        return scale.repeat_interleave(n // scale.shape[0], dim=0)  # blocks as wide as the weight
    if scale.dim() == 2 and scale.shape[1] > 1 and not (scale.shape[0] == 1 and scale.numel() == n):
        return scale
    per_row = scale.numel() == n and not whole and (n > 1 or scale.dim() > 0)
    return scale.reshape(n, 1) if per_row else scale.reshape(())


def _blocks(scale: Tensor, shape: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of a block; None for one scale a row or for all."""
    if scale.dim() == 0 or scale.shape[1] == 1:
        return None
    return shape[0] // scale.shape[0], shape[1] // scale.shape[1]


def _absmax(tensor: Tensor, blocks: tuple[int, int]) -> Tensor:
    """fp32 [N / rows, K / columns] of ``blocks``."""
    n, k = tensor.shape
    rows, columns = max(blocks[0], 1), max(blocks[1], 1)
    parts = tensor.abs().view(n // rows, rows, k // columns, columns)
    return parts.amax((1, 3)).float() if tensor.numel() else parts.new_zeros(n // rows, 1).float()


def _of_rows(scale: Tensor, rows: slice, shape: tuple[int, int]) -> Tensor:
    """What the weights of ``rows`` are multiplied by: broadcastable to [rows, K]."""
    blocks = _blocks(scale, shape)
    if blocks is None:
        return scale if scale.dim() == 0 else scale[rows]
    places = torch.arange(rows.start, rows.stop, device=scale.device) // blocks[0]
    return scale[places].repeat_interleave(blocks[1], dim=1)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around each value."""
    if not dtype.is_floating_point:
        return torch.ones_like(values)
    least, mantissa = _FORM[dtype]
    # frexp puts the mantissa in [0.5, 1), one power of two below the format's own.
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponent.clamp_min(least) - mantissa)
