"""AWQ W4A16 in comfy-kitchen's layout: computed from the dequantized weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
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


class AWQLayout(Layout, TensorCoreAWQW4A16Layout):
    """``W[n, k] = (code - 8) * scale[k // group, n] + zeros[k // group, n]``, codes of 4 bits."""

    NAME = "Ideogram4QuantAWQ"
    COARSE = True
    COLUMN_FIELDS = ("scale", "zeros")

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale``, ``zeros`` floating point ``[K / group_size, N]``."""

        scale: Tensor
        zeros: Tensor
        group_size: int = 64

        @property
        def label(self) -> str:
            return f"AWQ W4A16 g{self.group_size}"

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        group_size: int = 64,
        stochastic_rounding: int | None = 0,
        scale_dtype: torch.dtype = torch.float32,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """From each group's least to its greatest value in 15 steps.

        ``stochastic_rounding`` is a seed (0 or None: to nearest); ``scale_dtype`` is that of scales
        and zeros, which codes are chosen for as they are kept.
        """
        check_matrix(tensor, "AWQ")
        n, k = tensor.shape
        if k % group_size:
            raise OpError("AWQ packs whole groups", found=k, needed=f"a multiple of {group_size}")
        values = tensor.float().view(n, k // group_size, group_size)
        least, greatest = values.aminmax(dim=2)
        step = ((greatest - least) / 15).to(scale_dtype)
        zeros = (least + 8 * step.float()).to(scale_dtype)
        codes = (values - zeros[..., None]) / step.float().clamp_min(SCALE_FLOOR)[..., None] + 8
        generator = generator_for(stochastic_rounding, tensor.device)
        codes = codes.round() if generator is None else (codes + uniform(codes, generator)).floor()
        codes = codes.clamp_(0, 15).to(torch.uint8).view(n, k)
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)
        params = cls.Params(
            orig_dtype=tensor.dtype,
            orig_shape=(n, k),
            scale=step.t().contiguous(),
            zeros=zeros.t().contiguous(),
            group_size=group_size,
        )
        return packed, params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """comfy-kitchen's, in ``orig_dtype``."""
        return super().dequantize(qdata, params).to(params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep the group and the scales' dtype when a patched weight is quantized again."""
        params = qtensor._params
        return {"group_size": params.group_size, "scale_dtype": params.scale.dtype}

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """comfy-kitchen's name of it."""
        return {"format": "awq_w4a16", "group_size": params.group_size}


def awq_tensor(
    packed: Tensor, scale: Tensor, zeros: Tensor, *, dtype: torch.dtype
) -> QuantizedTensor:
    """A weight of AWQ W4A16: ``packed int8 [N, K / 2]``, ``scale`` and ``zeros [K / group, N]``.

    ``dtype`` is what it dequantizes to. Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    if packed.dtype not in (torch.int8, torch.uint8) or packed.dim() != 2 or scale.dim() != 2:
        raise OpError(
            "packed AWQ codes are an int8 matrix with a matrix of group scales",
            found=f"{packed.dtype} {list(packed.shape)}, scales {list(scale.shape)}",
            needed="int8 [N, K / 2], scales [groups, N]",
        )
    n, k = packed.shape[0], packed.shape[1] * 2
    groups = scale.shape[0]
    fits = scale.shape == zeros.shape == (groups, n) and groups > 0 and k % groups == 0
    if not fits or not (scale.is_floating_point() and zeros.is_floating_point()):
        raise OpError(
            "the scales and zeros do not fit the AWQ weight",
            found=f"{list(scale.shape)} and {list(zeros.shape)}",
            needed=f"floating point [groups, {n}] both",
        )
    check_same_device(packed, scale=scale, zeros=zeros)
    params = AWQLayout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        scale=scale.contiguous(),
        zeros=zeros.contiguous(),
        group_size=k // groups,
    )
    return Weight(packed.contiguous().view(torch.int8), AWQLayout.NAME, params)
