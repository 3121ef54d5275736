"""Weights of W4A8, W6A8 and W4A4 from their stored parts, every part checked."""

from __future__ import annotations

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from ..grouped import LEVELS, bits_of
from ..rotation import GROUPS
from .base import check_dtype, check_same_device
from .packed import W4A4Layout, W4A8Layout
from .weight import Weight


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
    check_form(k, bits, group_size, rotation, plain=codebook is None and correction is None)
    if codebook is not None:
        _check_size("codebook", codebook, (LEVELS,))
    if correction is not None:
        _check_size("zeros", correction, (k // group_size, n))
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
    check_rotation(rotation, k)
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


def check_form(k: int, bits: int, group: int, rotation: int, *, plain: bool) -> None:
    """OpError unless there are rows of ``k`` codes in such groups; ``plain``: without codebook and
    zeros, which 6-bit codes are."""
    if group < 4 or (16 % group and group % 16):
        raise OpError("unusable group of a packed weight", found=group, needed="4, 8 or 16 times n")
    if bits == 6 and not plain:
        raise OpError("6-bit codes have neither codebook nor zeros", found="one of them")
    check_rotation(rotation, k)


def check_rotation(rotation: int, k: int) -> None:
    """OpError unless rows of ``k`` can be rotated in groups of ``rotation``."""
    if rotation not in GROUPS or k % rotation:
        raise OpError(
            "unusable rotation group", found=rotation, needed=f"one of {GROUPS} that divides {k}"
        )


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
        bad = None if tensor is None else ~tensor.isfinite()
        if bad is not None and bool(bad.any()):
            first = bad.nonzero()[0].tolist()
            raise OpError(
                f"{name} holds NaN or infinity",
                found=f"{int(bad.sum())} of {bad.numel()}, the first at {first}",
                needed="finite values; the file is damaged, or its quantizer overflowed",
            )
