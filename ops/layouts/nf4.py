"""NF4 as bitsandbytes stores it; computed through the dequantized weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from .. import nf4
from ..chunks import row_chunks
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


class NF4Layout(Layout):
    """``W = code[qdata] * absmax`` by blocks of the flattened weight.

    The storage is uint8 ``[N, K / 2]`` and ``absmax [N, K / block_size]`` where blocks end with
    rows, else both are flat and rows cannot be sliced off.
    """

    NAME = "Ideogram4QuantNF4"
    COARSE = True
    ROW_FIELDS = ("absmax",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``absmax`` fp32, ``code fp32 [16]``, ``block_size`` values to an absmax."""

        absmax: Tensor
        code: Tensor
        block_size: int

        @property
        def label(self) -> str:
            return "NF4"

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: object = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        block_size: int = 64,
        code: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """The nearest code of each value over its block's absmax, ``code`` NF4 unless given.

        ``stochastic_rounding`` is a seed (0 or None: to nearest). ``scale`` has no meaning here:
        every block has its own.
        """
        check_matrix(tensor, "NF4")
        shape, device = tuple(tensor.shape), tensor.device
        table = nf4.normal_float(device) if code is None else code.to(device, torch.float32)
        generator = generator_for(stochastic_rounding, device)
        parts = []
        for rows in _pieces(shape, block_size, device):
            values = tensor[rows].float()
            noise = None if generator is None else uniform(values, generator)
            parts.append(nf4.encode(values, table, block_size, noise))
        qdata, absmax = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        qdata, absmax = _shaped(qdata, absmax, shape, block_size)
        return qdata, cls.Params(
            orig_dtype=tensor.dtype,
            orig_shape=shape,
            absmax=absmax,
            code=table,
            block_size=block_size,
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """``code[qdata] * absmax`` in ``orig_dtype``."""
        n, k = params.matrix_shape
        out = torch.empty((n, k), dtype=params.orig_dtype, device=qdata.device)
        for rows in _pieces((n, k), params.block_size, qdata.device):
            whole = rows.stop - rows.start == n
            data = qdata if whole else qdata[rows]
            absmax = params.absmax if whole else params.absmax[rows]
            count = (rows.stop - rows.start) * k
            values = nf4.decode(data, absmax, params.code, count, params.block_size)
            out[rows] = values.view(-1, k)
        return out

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """bitsandbytes' tensors, under its names."""
        state = {
            "quant_type": "nf4",
            "blocksize": params.block_size,
            "dtype": str(params.orig_dtype).removeprefix("torch."),
            "shape": list(params.matrix_shape),
        }
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {
            "": qdata,
            ".absmax": params.absmax,
            ".quant_map": params.code,
            ".quant_state.bitsandbytes__nf4": text,
        }

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """A format of our name: stock ComfyUI has none. bitsandbytes' tensors say the rest."""
        return {"format": "ideogram4_quant_nf4"}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep block size and table when a patched weight is quantized again."""
        return {"block_size": qtensor._params.block_size, "code": qtensor._params.code}

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        """Where blocks and bytes end with rows."""
        return _aligned(params.matrix_shape[1], params.block_size)


def nf4_tensor(
    data: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
    block_size: int = 64,
    code: Tensor | None = None,
) -> QuantizedTensor:
    """A weight from bitsandbytes' bytes, any double quantization of ``absmax`` already undone.

    ``data uint8`` of ``ceil(N * K / 2)`` bytes, ``absmax`` of ``ceil(N * K / block_size)`` values,
    ``shape (N, K)``, ``code [16]`` the table (NF4 if None), ``dtype`` what it dequantizes to.
    Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    if len(shape) != 2 or block_size < 1:
        raise OpError(
            "an NF4 weight is a matrix of blocks",
            found=f"shape {tuple(shape)}, block_size {block_size}",
            needed="(N, K) and a positive block size",
        )
    n, k = (int(size) for size in shape)
    code = nf4.normal_float(data.device) if code is None else code
    check_same_device(data, absmax=absmax, code=code)
    needed = (-(-n * k // 2), -(-n * k // block_size), len(nf4.CODE))
    found = (data.numel(), absmax.numel(), code.numel())
    floating = absmax.is_floating_point() and code.is_floating_point()
    if data.dtype != torch.uint8 or not floating or found != needed:
        raise OpError(
            f"the bytes do not fit an NF4 weight of shape {(n, k)}",
            found=f"{data.dtype} of {found[0]} bytes, {absmax.dtype} absmax of {found[1]} values, "
            f"{code.dtype} code of {found[2]}",
            needed=f"torch.uint8 of {needed[0]}, {needed[1]} and {needed[2]} floating point values",
        )
    qdata, absmax = _shaped(data.contiguous(), absmax.float(), (n, k), block_size)
    params = NF4Layout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        absmax=absmax.contiguous(),
        code=code.float().reshape(-1),
        block_size=int(block_size),
    )
    return Weight(qdata, NF4Layout.NAME, params)


def _aligned(k: int, block_size: int) -> bool:
    return k % block_size == 0 and k % 2 == 0


def _shaped(
    qdata: Tensor, absmax: Tensor, shape: tuple[int, int], block_size: int
) -> tuple[Tensor, Tensor]:
    n, k = shape
    if not _aligned(k, block_size):
        return qdata.reshape(-1), absmax.reshape(-1)
    return qdata.reshape(n, k // 2), absmax.reshape(n, k // block_size)


def _pieces(shape: tuple[int, int], block_size: int, device: torch.device):
    """Rows to work on at a time; all of them where blocks run across rows."""
    if math.prod(shape) and _aligned(shape[1], block_size):
        return row_chunks(shape, device)
    return iter((slice(0, shape[0]),))
