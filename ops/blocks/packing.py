"""Bits of K-quant blocks: six-bit scales and minima, nibbles."""

from __future__ import annotations

import torch
from torch import Tensor

EACH_BYTE = 0x0101010101010101  # codes are packed eight bytes at a time


# The six-bit scales and minima of groups 0 to 7, letters A to H, in 12 bytes:
#     bytes 0-3    EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD    scales; high bits of E to H
#     bytes 4-7    eeaaaaaa ffbbbbbb ggcccccc hhdddddd    minima; high bits of e to h
#     bytes 8-11   eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH    low bits of both


def unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, 12] -> scales, minima float32 [n, 8]."""
    scale, minimum, low = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([scale & 63, (low & 15) | ((scale >> 2) & 48)], 1)
    minima = torch.cat([minimum & 63, (low >> 4) | ((minimum >> 2) & 48)], 1)
    return scales.to(torch.float32), minima.to(torch.float32)


def pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """float32 [8, n] each -> uint8 [n, 12]."""
    scales, minima = scales.t().to(torch.uint8), minima.t().to(torch.uint8)
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], 1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[n, 128] -> uint8 [n, 8, 32]."""
    packed = packed.unflatten(1, (4, 32))
    return torch.stack([packed & 0x0F, packed >> 4], 2).view(-1, 8, 32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """The low four bits of uint8 [n, 8, 32] -> [n, 128]."""
    low = codes.view(torch.int64) & 0x0F * EACH_BYTE
    return (low[:, 0::2] | (low[:, 1::2] << 4)).view(torch.uint8).flatten(1)
