"""Weights of 4 or 6 bits with a scale a group, which decode to the int8 grid: W4A8 and W6A8.

comfy-kitchen's container ``asym_w4a8_int8``. A row of K codes is K / 2 bytes of low nibbles (even
column: low nibble), and with 6 bits K / 4 bytes more with the two high bits of each code (column c:
byte c // 4, bits 2 * (c % 4)). The weight is

    ``W = R(grid * s_channel)``, ``grid = clamp(round(level * s_rel), -127, 127)``

with ``level`` the code's entry in a table of 16 values, or the code less half its range, ``s_rel``
one factor a group of columns, ``s_channel`` one scale a row, R the ConvRot rotation.
``correction``, of the asymmetric form, is added to a group's columns before the rotation, and has
no int8 product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OpError

BITS = (4, 6)
LEVELS = 16
"""Entries of a codebook; only 4-bit codes have one."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[N, K]``, integers of 0 to 2^bits - 1 -> int8 ``[N, K * bits / 8]``.

    K is even, with 6 bits a multiple of 4. Raises OpError for other sizes and widths.
    """
    k = codes.shape[1]
    _check_bits(bits)
    if k % (2 if bits == 4 else 4):
        raise OpError("the row does not fill whole bytes", found=k, needed="a multiple of 4")
    values = codes.to(torch.uint8)
    low = (values[:, 0::2] & 15) | ((values[:, 1::2] & 15) << 4)
    if bits == 4:
        return low.view(torch.int8)
    high = values >> 4
    packed = high[:, 0::4]
    for place in range(1, 4):
        packed = packed | (high[:, place::4] << (2 * place))
    return torch.cat([low, packed], dim=1).view(torch.int8)


def unpack_codes(packed: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_codes`: int8 ``[N, K * bits / 8]`` -> uint8 ``[N, K]``."""
    bits = bits_of(packed.shape[1], k)
    data = packed.contiguous().view(torch.uint8)
    low = data[:, : k // 2]
    codes = torch.stack([low & 15, low >> 4], dim=2).reshape(len(data), k)
    if bits == 4:
        return codes
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    high = (data[:, k // 2 :, None] >> shifts) & 3
    return codes | (high.reshape(len(data), k) << 4)


def bits_of(row_bytes: int, k: int) -> int:
    """How wide the codes are in a row of so many bytes. Raises OpError if no width fits."""
    for bits in BITS:
        if k > 0 and row_bytes * 8 == k * bits:
            return bits
    raise OpError(
        "the bytes of a row fit no code width",
        found=f"{row_bytes} bytes for {k} weights",
        needed=" or ".join(f"{k * bits // 8} ({bits} bits)" for bits in BITS),
    )


def decode_grouped(packed: Tensor, s_rel: Tensor, codebook: Tensor | None, group: int) -> Tensor:
    """``clamp(round_half_even(level * s_rel), -127, 127)``: the int8 grid ``[N, K]``.

    ``packed int8 [N, K * bits / 8]``; ``s_rel [N, K / group]`` e4m3 or fp32, finite; ``codebook
    fp32 [16]`` for 4 bits or None (``level = code - 2^(bits - 1)``). Raises OpError where the width
    of the rows does not fit.
    """
    n, groups = s_rel.shape
    k = groups * group
    codes = unpack_codes(packed, k)
    if codebook is None:
        levels = codes.float() - float(1 << (bits_of(packed.shape[1], k) - 1))
    else:
        levels = codebook.float()[codes.int()]
    grid = levels.view(n, groups, group) * s_rel.float().unsqueeze(-1)
    return grid.round_().clamp_(-127, 127).to(torch.int8).view(n, k)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise OpError("codes have no such width", found=bits, needed=BITS)


def unpack_int4(packed: Tensor) -> Tensor:
    """Signed nibbles, even column low: int8 ``[N, K / 2]`` -> int8 ``[N, K]`` of -8 to 7.

    The codes of ``convrot_w4a4``, whose int8 grid they are: ``W = R(code * scale)``, a scale a row.
    """
    data = packed.contiguous().view(torch.int8)
    low = torch.bitwise_right_shift(torch.bitwise_left_shift(data, 4), 4)  # sign extends
    return torch.stack([low, data >> 4], dim=2).reshape(len(data), 2 * data.shape[1])


INT4_LIMIT = 7
"""Largest magnitude of such a code; -8 is left out, as comfy-kitchen leaves it out."""


def nearest_int4(values: Tensor, scale: Tensor) -> Tensor:
    """Codes in fp32 of rotated ``values`` [N, K] with a ``scale`` fp32 [N] a row."""
    return (values / scale[:, None]).round_().clamp_(-INT4_LIMIT, INT4_LIMIT)


def int4_scales(values: Tensor, shares: Sequence[float]) -> Tensor:
    """fp32 [N]: of each row, the scale whose nearest codes lose least of it.

    Of ``shares`` of the scale under which no weight is clipped.
    """
    widest = (values.abs().amax(1) / INT4_LIMIT).clamp_min(SCALE_FLOOR)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in shares:
        scale = widest * share
        lost = (nearest_int4(values, scale).mul_(scale[:, None]) - values).square_().sum(1)
        better = lost < least
        least, best = torch.where(better, lost, least), torch.where(better, scale, best)
    return best


def int8_grid(packed: Tensor, s_rel: Tensor | None, codebook: Tensor | None, group: int) -> Tensor:
    """The int8 grid ``[N, K]`` of a packed weight: :func:`decode_grouped`, or without group scales
    (``s_rel`` None) :func:`unpack_int4`.
    """
    if s_rel is None:
        return unpack_int4(packed)
    return decode_grouped(packed, s_rel, codebook, group)


SIX_BIT_LIMIT = 31
"""Largest magnitude of a 6-bit level; its code is the level plus 32."""

SCALE_FLOOR = 1e-8
"""Smallest scale of a group and of a row, as in comfy-kitchen."""


def encode_six_bits(
    values: Tensor, group: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(packed, s_rel, s_channel)`` of rotated ``values`` [N, K], a level ``absmax / 31`` a group.

    To nearest, or with a ``generator`` up or down by chance. For a comfy-kitchen without 6-bit
    codes. K is a multiple of 32 and of ``group``, a multiple of 16. Raises OpError for others.
    """
    n, k = values.shape
    if k % 32 or group % 16 or k % group:
        raise OpError("6-bit codes do not fill the rows", found=f"{k} in groups of {group}")
    grouped = values.float().view(n, k // group, group)
    scale = (grouped.abs().amax(2) / SIX_BIT_LIMIT).clamp_min(SCALE_FLOOR)
    channel = (scale.amax(1) * (SIX_BIT_LIMIT / 127)).clamp_min(SCALE_FLOOR)
    relative = (scale / channel[:, None]).to(torch.float8_e4m3fn)
    step = (relative.float() * channel[:, None])[..., None].clamp_min(SCALE_FLOOR**2)
    level = grouped / step
    if generator is None:
        level = level.round()
    else:
        level = (level + torch.rand(level.shape, generator=generator, device=level.device)).floor()
    codes = level.clamp_(-SIX_BIT_LIMIT, SIX_BIT_LIMIT).add_(SIX_BIT_LIMIT + 1)
    return pack_codes(codes.view(n, k), 6), relative, channel
