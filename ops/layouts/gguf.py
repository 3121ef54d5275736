"""GGUF blocks, kept packed as they lie in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from .. import blocks, decoding
from ..chunks import row_chunks
from ..gguf_compute import compute_here
from ..linear import LinearOptions, gguf_linear
from ..prequantized import gguf_product
from ..rotation import largest_group
from .base import BaseParams, Layout, check_dtype, check_matrix
from .hooks import InputHooks
from .patched import change_blocks
from .weight import Weight


class GGUFLayout(InputHooks, Layout):
    """``W = dequantize(qdata, qtype)``: uint8 ``[N, row_bytes]`` of one block format."""

    NAME = "Ideogram4QuantGGUF"
    KEEPS_CHANGES = True

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``qtype`` names a format of ``ops.blocks.FORMATS``."""

        qtype: str

        @property
        def label(self) -> str:
            return self.qtype

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: object = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        qtype: str = "Q8_0",
        stored: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """Encode into blocks of ``qtype``, with scales of their own.

        stored: the blocks that the weight had before it was changed, so that a change too small
        for the format's steps is not rounded away (see ``patched``). The host's keywords are
        accepted: ``scale`` has no meaning here, and stochastic rounding would undo the search of
        the encoders, which round to the least error.
        """
        check_matrix(tensor, qtype)
        shape = tuple(tensor.shape)
        row_bytes = _row_bytes(qtype, shape[1])
        params = cls.Params(orig_dtype=tensor.dtype, orig_shape=shape, qtype=qtype)
        if stored is not None and stored.shape == (shape[0], row_bytes):
            return change_blocks(tensor, stored.to(tensor.device), qtype), params
        qdata = torch.empty((shape[0], row_bytes), dtype=torch.uint8, device=tensor.device)
        for rows in row_chunks(shape, tensor.device):
            qdata[rows] = blocks.quantize(tensor[rows].float(), qtype)
        return qdata, params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The decoded weight in ``orig_dtype``."""
        return decoding.dequantize(qdata, params.qtype, params.matrix_shape, params.orig_dtype)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Type and shape, which the bytes do not tell."""
        shape = list(params.matrix_shape)
        return {"format": "ideogram4_quant_gguf", "qtype": params.qtype, "shape": shape}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep the block format, and small changes, when a patched weight is quantized again."""
        return {"qtype": qtensor._params.qtype, "stored": qtensor._qdata}

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """Through int8 or dense, by the format: see ``ops.linear.gguf_linear``."""
        params = weight._params
        return gguf_linear(
            x,
            weight._qdata,
            params.qtype,
            params.matrix_shape,
            bias,
            compute=options.gguf_compute,
            backend=options.backend,
        )

    @classmethod
    def input_recipe(
        cls, weight: QuantizedTensor, tokens: int, dtype: torch.dtype, options: LinearOptions
    ) -> tuple[Tensor | None, int | None] | None:
        """Rotated by the largest group where this weight runs through int8."""
        params = weight._params
        n, k = params.matrix_shape
        compute = compute_here(
            options.gguf_compute,
            params.qtype,
            (tokens, n, k),
            weight.device,
            dtype,
            options.backend,
        )
        through_int8 = compute == "w8a8" and not params.transposed
        return (None, largest_group(k)) if through_int8 else None

    @classmethod
    def multiply_rows(
        cls,
        q: Tensor,
        scale: Tensor,
        weight: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        options: LinearOptions,
    ) -> Tensor:
        """Blocks are decoded to rotated int8 for the call."""
        params = weight._params
        rotation = largest_group(params.matrix_shape[1])
        return gguf_product(
            q, scale, weight._qdata, params.qtype, bias, rotation, dtype, options.backend
        )


def gguf_tensor(
    data: Tensor, qtype: str, shape: tuple[int, int], *, dtype: torch.dtype
) -> QuantizedTensor:
    """A weight from GGUF bytes: ``data uint8`` of ``N * row_bytes`` bytes, ``shape (N, K)``.

    ``dtype`` is what it dequantizes to. Raises OpError for an unknown format, a K that is no
    multiple of its block and a number of bytes that does not fit.
    """
    check_dtype(dtype)
    if len(shape) != 2:
        raise OpError("a GGUF weight is a matrix", found=f"shape {tuple(shape)}", needed="(N, K)")
    n, k = (int(size) for size in shape)
    row_bytes = _row_bytes(qtype, k)
    if data.dtype != torch.uint8 or data.numel() != n * row_bytes:
        raise OpError(
            f"the bytes do not fit a {qtype} weight of shape {(n, k)}",
            found=f"{data.dtype} {tuple(data.shape)}",
            needed=f"torch.uint8 {(n, row_bytes)}",
        )
    params = GGUFLayout.Params(orig_dtype=dtype, orig_shape=(n, k), qtype=qtype)
    return Weight(data.reshape(n, row_bytes).contiguous(), GGUFLayout.NAME, params)


def _row_bytes(qtype: str, k: int) -> int:
    fmt = blocks.FORMATS.get(qtype)
    if fmt is None:
        raise OpError(
            "unknown GGUF format", found=repr(qtype), needed=f"one of {list(blocks.FORMATS)}"
        )
    if k % fmt.block_size:
        raise OpError(
            f"{qtype} packs whole blocks",
            found=f"in_features {k}",
            needed=f"a multiple of {fmt.block_size}",
        )
    return k // fmt.block_size * fmt.type_size
