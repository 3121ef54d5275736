"""INT8, one scale an output channel, with optional smoothing and rotation of the input channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from .. import prequantized, reference
from ..chunks import row_chunks
from ..linear import LinearOptions, int8_linear
from ..rotation import check_group, rotate
from .base import (
    BaseParams,
    Layout,
    check_dtype,
    check_matrix,
    check_same_device,
    generator_for,
    uniform,
)
from .hooks import InputHooks
from .weight import Weight


class Int8Layout(InputHooks, Layout):
    """``W = R(qdata * scale) / smooth``: int8 ``[N, K]``, symmetric, its own inverse rotation."""

    NAME = "Ideogram4QuantInt8"
    ROW_FIELDS = ("scale",)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(BaseParams):
        """``scale fp32 [N, 1]``, ``smooth fp32 [K]`` or None, ``rotation`` a group or None.

        ``dense``: the file wants it multiplied in 16 bits (``full_precision_matrix_mult``).
        """

        scale: Tensor
        smooth: Tensor | None = None
        rotation: int | None = None
        dense: bool = False

        @property
        def label(self) -> str:
            return int8_label(self.rotation, smooth=self.smooth is not None, dense=self.dense)

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        smooth: Tensor | None = None,
        rotation: int | None = None,
        dense: bool = False,
        **_: object,
    ) -> tuple[Tensor, Any]:
        """``round(R(W * smooth) / scale)``, ``scale = absmax / 127`` of each row unless given.

        ``stochastic_rounding`` is a seed (0 or None: to nearest even). The host's other keywords
        are accepted; ``tensor`` is never written to.
        """
        check_matrix(tensor, "int8")
        if rotation is not None:
            check_group(tensor.shape[1], rotation)
        n, device = tensor.shape[0], tensor.device
        given = None
        if scale is not None and not isinstance(scale, str):
            given = torch.as_tensor(scale, dtype=torch.float32, device=device)
            given = given.reshape(-1, 1).expand(n, 1).contiguous()
        smooth = None if smooth is None else smooth.to(device, torch.float32)
        generator = generator_for(stochastic_rounding, device)
        qdata = torch.empty(tuple(tensor.shape), dtype=torch.int8, device=device)
        scales = torch.empty((n, 1), dtype=torch.float32, device=device)
        for rows in row_chunks(tuple(tensor.shape), device):
            values = tensor[rows].float()
            values = values if smooth is None else values * smooth
            values = values if rotation is None else rotate(values, rotation)
            part = None if given is None else given[rows]
            qdata[rows], scales[rows] = _quantize(values, part, generator)
        return qdata, cls.Params(
            orig_dtype=tensor.dtype,
            orig_shape=tuple(tensor.shape),
            scale=scales,
            smooth=smooth,
            rotation=rotation,
            dense=dense,
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """``R(qdata * scale) / smooth``: the weight in original coordinates, in ``orig_dtype``."""
        out = torch.empty(qdata.shape, dtype=params.orig_dtype, device=qdata.device)
        for rows in row_chunks(tuple(qdata.shape), qdata.device):
            values = qdata[rows].float() * params.scale[rows]
            if params.rotation is not None:
                values = rotate(values, params.rotation)
            if params.smooth is not None:
                values = values / params.smooth
            out[rows] = values
        return out

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """Stock's ``int8_tensorwise`` with its ConvRot; with smoothing a format of our name."""
        smoothed = params.smooth is not None
        said = {"format": "ideogram4_quant_int8" if smoothed else "int8_tensorwise"}
        said |= {"full_precision_matrix_mult": True} if params.dense else {}
        if params.rotation is None:
            return said
        return {**said, "convrot": True, "convrot_groupsize": params.rotation}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep all but codes and scales when a patched weight is quantized again."""
        params = qtensor._params
        return {"smooth": params.smooth, "rotation": params.rotation, "dense": params.dense}

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """Dynamic W8A8, see ``ops.linear.int8_linear``; or dense where the options say so."""
        params = weight._params
        if options.int8_dense(params.dense):
            return super().linear(x, weight, bias, options)
        return int8_linear(
            x,
            weight._qdata,
            params.scale,
            bias,
            smooth=params.smooth,
            rotation=params.rotation,
            backend=options.backend,
        )

    @classmethod
    def input_recipe(
        cls, weight: QuantizedTensor, tokens: int, dtype: torch.dtype, options: LinearOptions
    ) -> tuple[Tensor | None, int | None] | None:
        """Smoothing and rotation of this weight."""
        params = weight._params
        if params.transposed or options.int8_dense(params.dense):
            return None
        return params.smooth, params.rotation

    @classmethod
    def int8_operands(cls, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Codes and scales as an int8 linear takes them."""
        return weight._qdata, weight._params.scale

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
        """``q @ qdata.T * scales + bias``."""
        params = weight._params
        return prequantized.int8_product(
            q, scale, weight._qdata, params.scale, bias, dtype, options.backend
        )


def int8_label(rotation: int | None, *, smooth: bool, dense: bool = False) -> str:
    """An int8 type as reports show it: with smoothing, with a rotation in groups of so many,
    multiplied in 16 bits."""
    turned = f" rot{rotation}" if rotation else ""
    return "INT8" + (" smooth" if smooth else "") + turned + (" 16-bit" if dense else "")


def int8_tensor(
    q: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    smooth: Tensor | None = None,
    rotation: int | None = None,
    dense: bool = False,
    validate: bool = False,
) -> QuantizedTensor:
    """A weight from int8 values: ``q = round(R(W * smooth) / scale)``.

    ``q int8 [N, K]``; ``scale`` floating point ``[N]``, ``[N, 1]`` or one value; ``smooth [K]``;
    ``dtype`` what it dequantizes to; ``dense`` a wish, see ``Params``. ``validate``
    also looks at the values, once: a scale that is not finite, or zero in a row that is not, raises
    OpError naming the row; in a row of zeros a zero scale becomes 1. Raises OpError for shapes,
    dtypes and devices that do not fit.
    """
    check_dtype(dtype)
    if q.dtype != torch.int8 or q.dim() != 2:
        raise OpError(
            "an int8 weight is an int8 matrix", found=f"{q.dtype} {tuple(q.shape)}", needed="[N, K]"
        )
    n, k = q.shape
    check_same_device(q, scale=scale, smooth=smooth)
    if not scale.is_floating_point() or scale.numel() not in (1, n):
        raise OpError(
            "the scales do not fit the int8 weight",
            found=f"{scale.dtype} {tuple(scale.shape)}",
            needed=f"floating point [{n}], [{n}, 1] or one value",
        )
    if smooth is not None and (smooth.numel() != k or not smooth.is_floating_point()):
        raise OpError(
            "the smoothing does not fit the int8 weight",
            found=f"{smooth.dtype} {tuple(smooth.shape)}",
            needed=f"floating point [{k}]",
        )
    if rotation is not None:
        check_group(k, rotation)
    scale = scale.float().reshape(-1, 1).expand(n, 1).contiguous()
    smooth = None if smooth is None else smooth.float().reshape(k).contiguous()
    if validate:
        scale = _validated(q, scale)
        usable = None if smooth is None else smooth.isfinite() & (1 / smooth).isfinite()
        if usable is not None and not usable.all():
            channel = int((~usable).nonzero()[0])
            raise OpError("bad smoothing", found=f"{smooth[channel].item()} in channel {channel}")
    params = Int8Layout.Params(
        orig_dtype=dtype,
        orig_shape=(n, k),
        scale=scale,
        smooth=smooth,
        rotation=rotation,
        dense=dense,
    )
    return Weight(q.contiguous(), Int8Layout.NAME, params)


def _validated(q: Tensor, scale: Tensor) -> Tensor:
    zero = scale == 0
    if bool(zero.any()):
        silent = ~(q != 0).any(dim=1, keepdim=True)
        scale = torch.where(zero & silent, 1.0, scale)
    bad = ~scale.isfinite() | (scale == 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise OpError(
            "bad scale in an int8 weight",
            found=f"{scale[row].item()} in row {row}",
            needed="finite and not zero",
        )
    return scale


def _quantize(
    values: Tensor, scale: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if scale is None and generator is None:
        q, scale = reference.quantize_rows(values)
        return q, scale[:, None]
    if scale is None:
        scale = (values.abs().amax(dim=1, keepdim=True) / 127).clamp_min(reference.SCALE_FLOOR)
    scaled = values / torch.where(scale == 0, reference.SCALE_FLOOR, scale)
    rounded = scaled.round() if generator is None else (scaled + uniform(scaled, generator)).floor()
    return rounded.nan_to_num(nan=0.0).clamp(-127, 127).to(torch.int8), scale
