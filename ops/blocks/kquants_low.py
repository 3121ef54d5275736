"""Q2_K and Q3_K: blocks of 256 weights in 16 groups of 16 that share a four- or six-bit scale.

    byte    0           16        32        80    82        96           108
    Q2_K    scales[16]  qs[64]              d     dmin |
    Q3_K    hmask[32]             qs[64]                    scales[12]   d    |

d and dmin are float16. Weight i of group s is ``d * sc[s] * q - dmin * m[s]`` in Q2_K (scales[s] =
mmmmssss) and ``d * sc[s] * (q - 4)`` in Q3_K.

    qs[32 h + l]  33221100   low two bits of weights l of the runs r = 0 .. 3 of half h, 32 a run
    hmask[l]      HHHHhhhh   bit 4 h + r: the third bit of weight l of run r of half h
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import half_bytes, half_field
from .kquant_search import AffineK, SymmetricK
from .refine import StoredFit

_RUNS = range(4)


class Q2_K(AffineK):
    """Codes 0 to 3; four bits for each sc and m."""

    name, ggml_type, type_size, code_limits = "Q2_K", 10, 84, (0, 3)
    knows_ggml = False
    group, scale_top = 16, 15
    widths = plain_widths = tuple(0.2 * number - 1 for number in range(10))
    moves = plain_moves = tuple((s, m) for s in (-1, 0, 1) for m in (-1, 0, 1) if s or m)

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        scale, minimum = self.grid(blocks)
        groups = out.view(-1, 16, 16)
        groups.copy_(_unpack_pairs(blocks[:, 16:80]).view(-1, 16, 16))
        groups.mul_(scale[:, :, None]).sub_(minimum[:, :, None])

    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        packed = blocks[:, :16]
        d, dmin = half_field(blocks, 40), half_field(blocks, 41)
        return d * (packed & 15).float(), dmin * (packed >> 4).float()

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        packed = _pack_pairs(codes.view(torch.uint8).view(-1, 2, 4, 32))
        return torch.cat([blocks[:, :16], packed, blocks[:, 80:]], 1)

    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        scales = fit.scale.t().to(torch.uint8) | (fit.minimum.t().to(torch.uint8) << 4)
        packed = _pack_pairs(codes.view(torch.uint8).view(-1, 2, 4, 32))
        return torch.cat([scales, packed, half_bytes(fit.d), half_bytes(fit.dmin)], 1)


class Q3_K(SymmetricK):
    """Codes -4 to 3; sc is six bits less 32, letters A to P, in 12 bytes:

    bytes 0-7    IIIIAAAA JJJJBBBB ... PPPPHHHH        low bits of A to H, of I to P
    bytes 8-11   MMIIEEAA NNJJFFBB OOKKGGCC PPLLHHDD   high bits
    """

    name, ggml_type, type_size, code_limits = "Q3_K", 11, 110, (-4, 3)
    knows_ggml = False
    group, scale_limits = 16, (-32, 31)
    widths = plain_widths = (2.6, 3.0, 3.4, 3.7, 4.0, 4.3, 4.6)
    moves = plain_moves = (-1, 1)

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        codes = _unpack_pairs(blocks[:, 32:96])
        high = blocks[:, :32]
        for half in range(2):
            for run in _RUNS:
                codes[:, half, run] |= ((high >> (4 * half + run)) & 1) << 2
        groups = out.view(-1, 16, 16)
        groups.copy_(codes.sub_(4).view(torch.int8).view(-1, 16, 16))  # wraps
        groups.mul_(self.grid(blocks)[0][:, :, None])

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        low = torch.cat([low & 15, low >> 4], 1)
        high = torch.cat([(high >> (2 * each)) & 3 for each in _RUNS], 1)
        scale = (low | (high << 4)).view(torch.int8) - 32
        return half_field(blocks, 54) * scale.float(), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        fields = self._pack_codes((codes + 4).view(torch.uint8).view(-1, 2, 4, 32))
        return torch.cat([*fields, blocks[:, 96:]], 1)

    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        fields = self._pack_codes((codes + 4).view(torch.uint8).view(-1, 2, 4, 32))
        scale = (fit.scale.t() + 32).to(torch.uint8)
        low = (scale[:, :8] & 15) | ((scale[:, 8:] & 15) << 4)
        high = (scale >> 4).view(-1, 4, 4)
        high = high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)
        return torch.cat([*fields, low, high, half_bytes(fit.d)], 1)

    @staticmethod
    def _pack_codes(codes: Tensor) -> list[Tensor]:
        """uint8 [n, 2, 4, 32] -> hmask [n, 32], qs [n, 64]."""
        third = codes >> 2
        high = third[:, 0, 0].clone()
        for half in range(2):
            for run in _RUNS:
                if half or run:
                    high |= third[:, half, run] << (4 * half + run)
        return [high, _pack_pairs(codes & 3)]


def _unpack_pairs(packed: Tensor) -> Tensor:
    """[n, 64] -> uint8 [n, 2, 4, 32]: two bits a weight."""
    packed = packed.unflatten(1, (2, 32))
    return torch.stack([(packed >> (2 * run)) & 3 for run in _RUNS], 2)


def _pack_pairs(codes: Tensor) -> Tensor:
    """uint8 [n, 2, 4, 32] of 0 to 3 -> [n, 64]."""
    packed = codes[:, :, 0].clone()
    for run in _RUNS[1:]:
        packed |= codes[:, :, run] << (2 * run)
    return packed.flatten(1)
