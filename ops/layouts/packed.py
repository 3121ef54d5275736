"""W4A8, W6A8 and W4A4 in comfy-kitchen's containers: packed codes that run on the int8 units."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorCoreConvRotW4A4Layout
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from .. import kitchen_ops
from ..grouped import LEVELS, bits_of, encode_six_bits, int8_grid
from ..linear import LinearOptions
from ..packed_int8 import packed_linear, packed_product
from ..rotation import GROUPS, rotate
from .base import BaseParams, Layout, check_dtype, check_matrix, check_same_device, generator_for
from .hooks import InputHooks
from .weight import Weight

SIX_BITS = "bits" in inspect.signature(AsymW4A8Int8Layout.quantize).parameters
"""Whether this comfy-kitchen knows W6A8; 0.2.40 does, 0.2.31 does not."""


class PackedLayout(InputHooks, Layout):
    """What the packed int8 layouts share: a product through int8 rows, or comfy-kitchen's own."""

    @classmethod
    def grid_parts(cls, weight: QuantizedTensor) -> tuple[Any, ...]:
        """``packed, s_rel, s_channel, codebook, group`` as ``ops.packed_int8`` takes them."""
        raise NotImplementedError

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
        if not cls.through_int8(weight._params) or cls.by_kitchen(weight, tokens, options):
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
        if x.shape[-1:] != (k,) or 0 in x.shape:
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


def w4a8_tensor(
    packed: Tensor,
    s_rel: Tensor,
    s_channel: Tensor,
    *,
    dtype: torch.dtype,
    group_size: int = 16,
    rotation: int = 256,
    codebook: Tensor | None = None,
    correction: Tensor | None = None,
) -> QuantizedTensor:
    """A weight of ``asym_w4a8_int8``: ``packed int8 [N, K * bits / 8]``, ``s_rel [N, K / group]``
    e4m3 or fp32, ``s_channel [N]``, ``codebook [16]``, ``correction [K / group, N]``.

    ``dtype`` is what it dequantizes to. Raises OpError for what does not fit, and for scales that
    are not finite.
    """
    check_dtype(dtype)
    n, k = _packed_shape(packed, s_rel, group_size)
    bits = bits_of(packed.shape[1], k)
    check_same_device(packed, s_rel=s_rel, s_channel=s_channel, codebook=codebook)
    _check_size("s_channel", s_channel, (n,))
    if bits == 6 and (codebook is not None or correction is not None):
        raise OpError("6-bit codes have neither codebook nor zeros", found="one of them")
    if codebook is not None:
        _check_size("codebook", codebook, (LEVELS,))
    if correction is not None:
        _check_size("zeros", correction, (k // group_size, n))
    if rotation not in GROUPS or k % rotation:
        raise OpError(
            "unusable rotation group", found=rotation, needed=f"one of {GROUPS} that divides {k}"
        )
    params = W4A8Layout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        scale=s_rel.contiguous(),
        s_channel=s_channel.reshape(n).float().contiguous(),
        codebook=None if codebook is None else codebook.float().reshape(-1).contiguous(),
        correction=correction,
        group_size=group_size,
        convrot_groupsize=rotation,
        bits=bits,
    )
    _check_finite(scale=s_rel.float(), s_channel=params.s_channel, codebook=params.codebook)
    return Weight(packed.contiguous(), W4A8Layout.NAME, params)


def w4a4_tensor(
    packed: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    rotation: int = 256,
    linear_dtype: str = "int4",
) -> QuantizedTensor:
    """A weight of ``convrot_w4a4``: ``packed int8 [N, K / 2]``, ``scale [N]``.

    ``dtype`` is what it dequantizes to. Raises OpError for what does not fit.
    """
    check_dtype(dtype)
    if packed.dtype != torch.int8 or packed.dim() != 2:
        raise OpError("packed int4 is an int8 matrix", found=f"{packed.dtype} {packed.dim()}-D")
    n, k = packed.shape[0], packed.shape[1] * 2
    check_same_device(packed, scale=scale)
    _check_size("scale", scale, (n,))
    if rotation not in GROUPS or k % rotation:
        raise OpError(
            "unusable rotation group", found=rotation, needed=f"one of {GROUPS} that divides {k}"
        )
    if linear_dtype not in ("int4", "int8"):
        raise OpError("unknown linear_dtype", found=repr(linear_dtype), needed="int4 or int8")
    params = W4A4Layout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        scale=scale.reshape(n).float().contiguous(),
        convrot_groupsize=rotation,
        linear_dtype=linear_dtype,
    )
    _check_finite(scale=params.scale)
    return Weight(packed.contiguous(), W4A4Layout.NAME, params)


def _packed_shape(packed: Tensor, s_rel: Tensor, group: int) -> tuple[int, int]:
    if packed.dtype != torch.int8 or packed.dim() != 2 or s_rel.dim() != 2:
        raise OpError(
            "a packed weight is an int8 matrix with a matrix of group scales",
            found=f"{packed.dtype} {list(packed.shape)}, scales {list(s_rel.shape)}",
        )
    if s_rel.dtype not in (torch.float8_e4m3fn, torch.float32) or len(s_rel) != len(packed):
        raise OpError(
            "the group scales do not fit the packed weight",
            found=f"{s_rel.dtype} {list(s_rel.shape)}",
            needed=f"float8_e4m3fn or float32 [{len(packed)}, groups]",
        )
    if group < 4 or (16 % group and group % 16):
        raise OpError("unusable group of a packed weight", found=group, needed="4, 8 or 16 times n")
    return len(packed), s_rel.shape[1] * group


def _check_size(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    wanted = torch.Size(shape)
    fits = tensor.shape == wanted or (len(shape) == 1 and tensor.numel() == shape[0])
    if not fits or not tensor.is_floating_point():
        raise OpError(
            f"{name} does not fit the packed weight",
            found=f"{tensor.dtype} {list(tensor.shape)}",
            needed=f"floating point {list(shape)}",
        )


def _check_finite(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise OpError(f"{name} holds NaN or infinity", found="no numbers", needed="numbers")
