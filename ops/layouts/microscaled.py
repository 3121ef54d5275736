"""NVFP4 and MXFP8 in comfy-kitchen's layouts: computed from the dequantized weight.

Devices from compute capability 10.0 on multiply NVFP4 and MXFP8 themselves; there the activations
are quantized to the same format and comfy-kitchen's product runs. Elsewhere values.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import (
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
)
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from ..linear import LinearOptions
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
from .fp8 import spacing
from .weight import Weight

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
E4M3_MAX, E2M1_MAX = 448.0, 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, E2M1_MAX)  # by code; a bit above them is the sign
_TILE_ROWS = 128  # cuBLAS keeps block scales in tiles of 128 rows x 4 columns


class MicroscaledLayout(Layout):
    """What NVFP4 and MXFP8 share: padded storage, block scales in cuBLAS's tile order.

    ``STOCK`` is comfy-kitchen's layout, whose tensors its product takes.
    """

    STOCK: type

    @classmethod
    def quantize(
        cls, tensor: Tensor, stochastic_rounding: int | None = 0, **_: object
    ) -> tuple[Tensor, Any]:
        """comfy-kitchen's quantizer, from fp32, with new scales.

        ``stochastic_rounding`` is a seed (0 or None: to nearest); the scales are the same.
        """
        check_matrix(tensor, cls.NAME)
        values = tensor.float()
        qdata, params = super().quantize(values, **cls.scales_for(values))
        generator = generator_for(stochastic_rounding, tensor.device)
        if generator is not None and tensor.numel():
            ones = cls.dequantize(cls.ones(qdata), params)  # the factor of each code, padded
            padding = (0, ones.shape[1] - values.shape[1], 0, ones.shape[0] - values.shape[0])
            relative = F.pad(values, padding) / ones
            qdata = cls.by_chance(torch.where(ones > 0, relative, 0.0), generator)
        return qdata, dataclasses.replace(params, orig_dtype=tensor.dtype)

    @classmethod
    @abstractmethod
    def ones(cls, qdata: Tensor) -> Tensor:
        """Storage like ``qdata`` whose codes all stand for 1."""

    @classmethod
    @abstractmethod
    def by_chance(cls, values: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of ``values`` fp32 [N, K]: of the two neighbours, each as likely as it is near."""

    @classmethod
    def scales_for(cls, values: Tensor) -> dict[str, Tensor]:
        """What the quantizer is told beside the values."""
        return {}

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """Natively where the device multiplies the format, else with the dequantized weight."""
        if weight._params.transposed or 0 in x.shape or not cls.native(x.device):
            return super().linear(x, weight, bias, options)
        return cls.native_linear(x, weight, bias)

    @classmethod
    def native(cls, device: torch.device) -> bool:
        """Whether ``device`` multiplies the format."""
        if device.type != "cuda" or torch.version.hip:
            return False
        return torch.cuda.get_device_capability(device) >= cls.MIN_SM_VERSION

    @classmethod
    def native_linear(cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """``x``, quantized to the format, times the weight by comfy-kitchen's product."""
        rows = x.reshape(-1, x.shape[-1])
        stock = cls.STOCK.__name__
        fields = {f.name: getattr(weight._params, f.name) for f in dataclasses.fields(cls.Params)}
        own = cls.STOCK.Params(**{**fields, "orig_dtype": x.dtype})
        matrix = QuantizedTensor(weight._qdata, stock, own)
        out = F.linear(QuantizedTensor.from_float(rows, stock), matrix)
        if bias is not None:  # comfy-kitchen wants one as long as the padded weight
            out = out + bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], weight.shape[0])

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        """A slice would cut through tiles of scales."""
        return False


class NVFP4Layout(MicroscaledLayout, TensorCoreNVFP4Layout):
    """``W = e2m1 * block_scale * scale``: blocks of 16, uint8 ``[N, K / 2]``, padded to 16."""

    NAME = "Ideogram4QuantNVFP4"
    COARSE = True
    STOCK = TensorCoreNVFP4Layout

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale fp32 []``; ``block_scale e4m3``, N padded to 128 and K / 16 to 4, in tiles."""

        scale: Tensor
        block_scale: Tensor

        @property
        def label(self) -> str:
            return "NVFP4"

    @classmethod
    def ones(cls, qdata: Tensor) -> Tensor:
        return torch.full_like(qdata, 0x22)

    @classmethod
    def by_chance(cls, values: Tensor, generator: torch.Generator) -> Tensor:
        table = torch.tensor(_E2M1, device=values.device)
        size = values.abs().clamp(max=_E2M1[-1])
        above = torch.bucketize(size, table).clamp_(min=1)
        low, high = table[above - 1], table[above]
        up = uniform(size, generator) * (high - low) < size - low
        codes = (above - 1 + up).to(torch.uint8) | (values < 0).to(torch.uint8) << 3
        return codes[:, 0::2] << 4 | codes[:, 1::2]  # the even column is the high nibble

    @classmethod
    def scales_for(cls, values: Tensor) -> dict[str, Tensor]:
        """comfy-kitchen's own scale, but above zero: it divides a matrix of zeros by zero."""
        return {"scale": (values.abs().amax() / (E4M3_MAX * E2M1_MAX)).clamp_min(SCALE_FLOOR)}

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """comfy-kitchen's names."""
        return TensorCoreNVFP4Layout.state_dict_tensors(qdata, params)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``nvfp4``."""
        return {"format": "nvfp4"}


class MXFP8Layout(MicroscaledLayout, TensorCoreMXFP8Layout):
    """``W = e4m3 * 2^e``: blocks of 32, ``[N, K]`` padded to 32."""

    NAME = "Ideogram4QuantMXFP8"
    STOCK = TensorCoreMXFP8Layout

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale`` e8m0, N padded to 128 and K / 32 to 4, in tiles."""

        scale: Tensor

        @property
        def label(self) -> str:
            return "MXFP8"

    @classmethod
    def ones(cls, qdata: Tensor) -> Tensor:
        return torch.ones_like(qdata, dtype=torch.float32).to(E4M3)

    @classmethod
    def by_chance(cls, values: Tensor, generator: torch.Generator) -> Tensor:
        values = values + (uniform(values, generator) - 0.5) * spacing(values, E4M3)
        return values.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``mxfp8``."""
        return {"format": "mxfp8"}


def nvfp4_tensor(
    data: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
) -> QuantizedTensor:
    """A weight from NVFP4 bytes: ``data uint8`` of N and K / 2 padded to 16 and 8, ``block_scale``
    e4m3 in tiles, ``scale`` one value, ``shape (N, K)``; ``dtype`` what it dequantizes to.

    Raises OpError for what does not fit, and for scales that are not finite.
    """
    check_dtype(dtype)
    n, k = shape
    stored, scales = nvfp4_shapes(n, k)
    check_same_device(data, block_scale=block_scale, scale=scale)
    _check("NVFP4 data", data, torch.uint8, stored)
    _check("NVFP4 block scales", block_scale, E4M3, scales)
    if scale.numel() != 1 or not bool(scale.isfinite().all()):
        raise OpError("bad NVFP4 scale", found=scale.tolist(), needed="one finite number")
    if not bool(block_scale.float().isfinite().all()):
        raise OpError("NVFP4 block scales hold NaN", found="NaN", needed="numbers")
    params = NVFP4Layout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        scale=scale.float().reshape(()),
        block_scale=block_scale.contiguous(),
    )
    return Weight(data.contiguous(), NVFP4Layout.NAME, params)


def mxfp8_tensor(
    data: Tensor, scale: Tensor, shape: tuple[int, int], *, dtype: torch.dtype
) -> QuantizedTensor:
    """A weight from MXFP8: ``data`` e4m3 padded to 32 x 32, ``scale`` e8m0 in tiles, ``shape (N,
    K)``; ``dtype`` what it dequantizes to. Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    n, k = shape
    stored, scales = mxfp8_shapes(n, k)
    check_same_device(data, scale=scale)
    _check("MXFP8 data", data, E4M3, stored)
    _check("MXFP8 block scales", scale, E8M0, scales)
    params = MXFP8Layout.Params(orig_dtype=dtype, orig_shape=(n, k), scale=scale.contiguous())
    return Weight(data.contiguous(), MXFP8Layout.NAME, params)


def nvfp4_shapes(n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the data and of the block scales of a weight [n, k]."""
    rows, columns = TensorCoreNVFP4Layout.get_padded_shape((n, k))
    return (rows, columns // 2), _tiled(n, columns // 16)


def mxfp8_shapes(n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the data and of the block scales of a weight [n, k]."""
    rows, columns = TensorCoreMXFP8Layout.get_padded_shape((n, k))
    return (rows, columns), _tiled(n, columns // 32)


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of block scales as cuBLAS lays them out: whole tiles."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS, -(-columns // 4) * 4


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise OpError(
            f"{what} do not fit the weight",
            found=f"{tensor.dtype} {list(tensor.shape)}",
            needed=f"{dtype} {list(shape)}",
        )
