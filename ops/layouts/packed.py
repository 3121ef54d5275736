"""W4A8, W6A8 and W4A4 in comfy-kitchen's containers: packed codes that run on the int8 units."""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorCoreConvRotW4A4Layout
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from .. import kitchen_ops
from ..chunks import row_chunks
from ..grouped import (
    bits_of,
    encode_six_bits,
    int4_scales,
    int8_grid,
    nearest_int4,
    pack_codes,
)
from ..linear import LinearOptions
from ..packed_int8 import packed_linear, packed_product
from ..rotation import GROUPS, rotate
from .base import BaseParams, Layout, check_matrix, generator_for
from .hooks import InputHooks

SIX_BITS = "bits" in inspect.signature(AsymW4A8Int8Layout.quantize).parameters
"""Whether this comfy-kitchen knows W6A8; 0.2.40 does, 0.2.31 does not."""


# Scales tried for a changed W4A4 weight, as shares of its absmax: fewer than a file's maker tries,
# as a host may change weights at every step. Best of 256 Gaussian weights is 0.75, of 12288 0.55.
_SHARES = (0.5, 0.57, 0.64, 0.71, 0.78, 0.85, 0.92, 1.0)


class PackedLayout(InputHooks, Layout):
    """What the packed int8 layouts share: a product through int8 rows, or comfy-kitchen's own."""

    COARSE = True

    @classmethod
    @abstractmethod
    def grid_parts(cls, weight: QuantizedTensor) -> tuple[Any, ...]:
        """``packed, s_rel, s_channel, codebook, group`` as ``ops.packed_int8`` takes them."""

    @classmethod
    @abstractmethod
    def kitchen_linear(cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` by comfy-kitchen's own op."""

    @classmethod
    def through_int8(cls, params: Any) -> bool:
        """Whether the weight is an int8 grid that our kernels rotate for."""
        return params.convrot_groupsize in GROUPS and not params.transposed

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """comfy-kitchen's quantizer, from fp32: it rounds in the dtype that it is handed."""
        check_matrix(tensor, cls.NAME)
        known = inspect.signature(super().quantize).parameters
        kept = {name: value for name, value in kwargs.items() if name in known}
        kept["stochastic_rounding"] = kept.get("stochastic_rounding") or 0  # None: to nearest
        try:
            qdata, params = super().quantize(tensor.float(), **kept)
        except ValueError as error:  # sizes that the container does not take
            found = f"{list(tensor.shape)} with {kept}"
            raise OpError(f"cannot be stored so: {error}", found=found) from error
        return qdata, dataclasses.replace(params, orig_dtype=tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """comfy-kitchen's, to the bit: in ``orig_dtype`` before the rotation and after it."""
        if not len(qdata):  # which comfy-kitchen cannot reshape
            return qdata.new_empty(params.matrix_shape, dtype=params.orig_dtype)
        return super().dequantize(qdata, params)

    @classmethod
    def input_recipe(
        cls, weight: QuantizedTensor, tokens: int, dtype: torch.dtype, options: LinearOptions
    ) -> tuple[Tensor | None, int | None] | None:
        """The rotation of this weight where our product runs it."""
        if options.int8_dense() or not cls.through_int8(weight._params):
            return None
        if cls.by_kitchen(weight, tokens, options):
            return None
        return None, weight._params.convrot_groupsize

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
        """Codes are decoded to their int8 grid for the call."""
        return packed_product(q, scale, *cls.grid_parts(weight), bias, dtype, options.backend)

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """comfy-kitchen's kernels where they are chosen, else through int8 rows, else dense."""
        params, k = weight._params, weight.shape[1]
        if x.shape[-1:] != (k,) or 0 in x.shape or options.int8_dense():
            return super().linear(x, weight, bias, options)
        if cls.by_kitchen(weight, x.numel() // k, options):
            return cls.kitchen_linear(x, weight, None if bias is None else bias.to(x.dtype))
        if not cls.through_int8(params):
            return super().linear(x, weight, bias, options)
        rotation = params.convrot_groupsize
        return packed_linear(x, *cls.grid_parts(weight), bias, rotation, options.backend)

    @classmethod
    def by_kitchen(cls, weight: QuantizedTensor, tokens: int, options: LinearOptions) -> bool:
        """Whether comfy-kitchen's own kernel runs this weight."""
        if weight._params.transposed:
            return False
        shape = (tokens, *weight.shape)
        return kitchen_ops.chosen(cls.KITCHEN_OP, shape, weight.device, options.backend)


class W4A8Layout(PackedLayout, AsymW4A8Int8Layout):
    """``W = R(clamp(round(level * s_rel)) * s_channel + correction)``: see ``ops.grouped``."""

    NAME = "Ideogram4QuantW4A8"
    KITCHEN_OP = "w4a8_int8_linear"
    ROW_FIELDS = ("scale", "s_channel")
    COLUMN_FIELDS = ("correction",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale`` (comfy-kitchen's name of s_rel) e4m3 or fp32 ``[N, K / group_size]``,
        ``s_channel fp32 [N]``, ``codebook fp32 [16]``, ``correction [K / group_size, N]``.
        """

        scale: Tensor
        s_channel: Tensor
        codebook: Tensor | None = None
        correction: Tensor | None = None
        group_size: int = 16
        convrot_groupsize: int = 256
        mma_packed: bool = False
        bits: int = 4

        @property
        def label(self) -> str:
            return f"W{self.bits}A8 g{self.group_size}"

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """comfy-kitchen's; its version before 0.2.40 makes no 6-bit codes, and the formula does."""
        if kwargs.get("bits", 4) == 6 and not SIX_BITS:
            return cls._six_bits(tensor, **kwargs)
        qdata, params = super().quantize(tensor, **kwargs)
        return qdata, dataclasses.replace(params, bits=bits_of(qdata.shape[1], tensor.shape[1]))

    @classmethod
    def _six_bits(
        cls,
        tensor: Tensor,
        group_size: int = 16,
        convrot_groupsize: int = 256,
        stochastic_rounding: int | None = 0,
        **_: object,
    ) -> tuple[Tensor, Any]:
        check_matrix(tensor, cls.NAME)
        generator = generator_for(stochastic_rounding, tensor.device)
        rotated = rotate(tensor.float(), convrot_groupsize)
        packed, relative, channel = encode_six_bits(rotated, group_size, generator)
        return packed, cls.Params(
            orig_dtype=tensor.dtype,
            orig_shape=tuple(tensor.shape),
            scale=relative,
            s_channel=channel,
            group_size=group_size,
            convrot_groupsize=convrot_groupsize,
            bits=6,
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """comfy-kitchen's; before 0.2.40 it knows no 6-bit codes, and the formula decodes them."""
        if params.bits == 4 or SIX_BITS or not len(qdata):
            return super().dequantize(qdata, params)
        grid = int8_grid(qdata, params.scale, None, params.group_size)
        values = grid.float() * params.s_channel[:, None]
        return rotate(values, params.convrot_groupsize).to(params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep grouping, width and table when a patched weight is quantized again."""
        return {**super().requantize_kwargs(qtensor), "bits": qtensor._params.bits}

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """comfy-kitchen's names."""
        return AsymW4A8Int8Layout.state_dict_tensors(qdata, params)

    @classmethod
    def through_int8(cls, params: Any) -> bool:
        packed = params.mma_packed or params.correction is not None
        return not packed and super().through_int8(params)

    @classmethod
    def grid_parts(cls, weight: QuantizedTensor) -> tuple[Any, ...]:
        params = weight._params
        codes = (weight._qdata, params.scale, params.s_channel, params.codebook)
        return (*codes, params.group_size)

    @classmethod
    def by_kitchen(cls, weight: QuantizedTensor, tokens: int, options: LinearOptions) -> bool:
        if weight._params.mma_packed:  # the host did that: it lies as its kernel reads it
            return not weight._params.transposed
        return super().by_kitchen(weight, tokens, options)

    @classmethod
    def kitchen_linear(cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """``comfy_kitchen.tensor.w4a8_int8_linear``."""
        return kitchen_ops.w4a8_linear(x, weight._qdata, weight._params, bias)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``asym_w4a8_int8``."""
        return {
            "format": "asym_w4a8_int8",
            "group_size": params.group_size,
            "convrot_groupsize": params.convrot_groupsize,
        }

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        return not params.mma_packed


class W4A4Layout(PackedLayout, TensorCoreConvRotW4A4Layout):
    """``W = R(code * scale)``: signed int4, a scale a row; the activations are int4 or int8."""

    NAME = "Ideogram4QuantW4A4"
    KITCHEN_OP = "convrot_w4a4_linear"
    ROW_FIELDS = ("scale",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale fp32 [N]``; ``linear_dtype`` is the file's wish for the activations."""

        scale: Tensor
        convrot_groupsize: int = 256
        quant_group_size: int = 64
        linear_dtype: str = "int4"

        @property
        def label(self) -> str:
            return "W4A4"

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """comfy-kitchen's by chance; to nearest with the scales that lose least, not absmax."""
        qdata, params = super().quantize(tensor, **kwargs)
        group = params.convrot_groupsize
        if kwargs.get("stochastic_rounding") or group not in GROUPS:
            return qdata, params
        scale = torch.empty_like(params.scale)
        for rows in row_chunks(tuple(tensor.shape), tensor.device):
            values = rotate(tensor[rows].float(), group)
            scale[rows] = int4_scales(values, _SHARES)
            codes = nearest_int4(values, scale[rows]).to(torch.int8)
            qdata[rows] = pack_codes(codes & 15, 4)
        return qdata, dataclasses.replace(params, scale=scale)

    @classmethod
    def grid_parts(cls, weight: QuantizedTensor) -> tuple[Any, ...]:
        return weight._qdata, None, weight._params.scale, None, 0

    @classmethod
    def kitchen_linear(cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """``comfy_kitchen.tensor.convrot_w4a4_linear``."""
        return kitchen_ops.w4a4_linear(x, weight._qdata, weight._params, bias)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``convrot_w4a4``."""
        said = {"format": "convrot_w4a4", "convrot_groupsize": params.convrot_groupsize}
        return said if params.linear_dtype == "int4" else {**said, "linear_dtype": "int8"}
