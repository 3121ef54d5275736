"""Q4_K, Q5_K, Q6_K: blocks of 256 weights in groups that share a six- or eight-bit scale.

    byte    0     2      4            16        48          144  176
    Q4_K    d     dmin   scales[12]   qs[128]               |
    Q5_K    d     dmin   scales[12]   qh[32]    qs[128]          |

    byte    0        128       192              208  210
    Q6_K    ql[128]  qh[64]    scales[16]       d    |

d and dmin are float16. Weight i of group s is ``d * sc[s] * q - dmin * m[s]`` in Q4_K and Q5_K
(8 groups of 32) and ``d * sc[s] * (q - 32)`` in Q6_K (16 groups of 16, sc in int8).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from . import ggml
from .base import divide, half_bytes, half_field
from .columns import ordered_sum, square_root
from .kquant_search import AffineK, SymmetricK, columns_of, rows_of, steps_to_peak, steps_to_top
from .packing import EACH_BYTE, pack_nibbles, pack_scales, unpack_nibbles, unpack_scales
from .refine import StoredFit, as_stored

SCALE_TOP = 63  # six bits

# Steps of (scale, minimum) that the search with importance tries. Scales of Q6_K are so fine (seven
# bits) that sixteen of them gain 0.4 dB at most with error feedback (bench_importance.py), for two
# thirds of the rate: it tries none.
AFFINE_MOVES = tuple((s, m) for s in (-1, 0, 1) for m in (-1, 0, 1) if s or m)

# Steps over a group, beside the highest code, that the search with importance tries: it pays to
# clip the peaks of columns that count little.
AFFINE_WIDTHS = tuple(0.2 * number - 2 for number in range(15))

# Steps to the peak. With importance a fifth one, of 34, gains 0.07 dB where codes are then rounded
# to nearest, and loses as much where they are fed back (bench_importance.py).
SYMMETRIC_WIDTHS = (30.0, 31.0, 32.0, 33.0)


class _SixBitK(AffineK):
    """``d * sc * q - dmin * m``: 8 groups of 32 weights, six bits for each sc and m."""

    group, scale_top, widths, moves = 32, SCALE_TOP, AFFINE_WIDTHS, AFFINE_MOVES
    ggml_ranges: ClassVar[Tensor]  # what ggml tries

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        scale, minimum = self.grid(blocks)
        groups = out.view(-1, 8, 32)
        groups.copy_(self._unpack_codes(blocks))
        groups.mul_(scale[:, :, None]).sub_(minimum[:, :, None])

    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        scale, minimum = unpack_scales(blocks[:, 4:16])
        return half_field(blocks, 0) * scale, half_field(blocks, 1) * minimum

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        fields = self._pack_codes(codes.view(torch.uint8).view(-1, 8, 32))
        return torch.cat([blocks[:, :16], *fields], 1)

    def encode_as_ggml(self, weights: Tensor) -> Tensor:
        x = columns_of(weights, self.group)
        top = self.code_limits[1]
        flat = x.view(self.group, -1)
        fit = ggml.fit_affine(flat, _plain_weights(flat), top, self.ggml_ranges)
        fit = ggml.AffineFit(*(field.view(x.shape[1:]) for field in fit))
        d, scale = steps_to_top(fit.scale, SCALE_TOP)
        dmin, minimum = steps_to_top(fit.offset, SCALE_TOP)
        step, shift = as_stored(d) * scale, as_stored(dmin) * minimum  # [8, n]
        codes = torch.where(step != 0, (x + shift).div_(step), (x - fit.base).mul_(fit.inverse))
        codes = codes.round_().clamp_(0, top).to(torch.int8)
        return self._pack(StoredFit(d, scale, dmin, minimum), rows_of(codes))

    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        fields = self._pack_codes(codes.view(torch.uint8))
        scales = pack_scales(fit.scale, fit.minimum)
        return torch.cat([half_bytes(fit.d), half_bytes(fit.dmin), scales, *fields], 1)

    @abstractmethod
    def _unpack_codes(self, blocks: Tensor) -> Tensor:
        """The codes of ``blocks`` as uint8 [n, 8, 32]."""

    @abstractmethod
    def _pack_codes(self, codes: Tensor) -> list[Tensor]:
        """The fields after the scales, of codes uint8 [n, 8, 32]."""


class Q4_K(_SixBitK):
    """Byte l of the j-th 32 bytes of qs: the low nibble is of group 2 j, the high of 2 j + 1."""

    name, ggml_type, type_size, code_limits = "Q4_K", 12, 144, (0, 15)
    plain_widths = tuple(0.2 * number - 1 for number in range(10))
    gaussian_loss = 5.0e-3
    ggml_ranges = ggml.grid(21, -1.0, 0.1, 15)

    def _unpack_codes(self, blocks: Tensor) -> Tensor:
        return unpack_nibbles(blocks[:, 16:])

    def _pack_codes(self, codes: Tensor) -> list[Tensor]:
        return [pack_nibbles(codes)]


class Q5_K(_SixBitK):
    """As Q4_K; bit s of qh[l] is the fifth bit of weight l in group s."""

    name, ggml_type, type_size, code_limits = "Q5_K", 13, 176, (0, 31)
    plain_widths = (-1.0, -0.7, -0.4, -0.1, 0.2, 0.5)
    gaussian_loss = 1.26e-3
    ggml_ranges = ggml.grid(16, -0.5, 0.1, 31)

    def _unpack_codes(self, blocks: Tensor) -> Tensor:
        codes = unpack_nibbles(blocks[:, 48:])
        high = blocks[:, 16:48].contiguous().view(torch.int32)  # four bytes at a time
        words = codes.view(torch.int32)
        for group in range(8):
            words[:, group] |= ((high >> group) & 0x01010101) << 4
        return codes

    def _pack_codes(self, codes: Tensor) -> list[Tensor]:
        high = (codes.view(torch.int64) >> 4) & 0x01 * EACH_BYTE
        packed = high[:, 0].clone()
        for group in range(1, 8):
            packed |= high[:, group] << group
        return [packed.view(torch.uint8), pack_nibbles(codes)]


class Q6_K(SymmetricK):
    """Each half of 128 weights holds four runs of 32, g = 0 .. 3, in 64 bytes ql and 32 bytes qh.

    ql[l] = 22220000, ql[l + 32] = 33331111, qh[l] = 33221100: the digit is the run g whose
    weight l owns the bits; ql holds the low four, qh the high two.
    """

    name, ggml_type, type_size, code_limits = "Q6_K", 14, 210, (-32, 31)
    group, scale_limits = 16, (-128, 127)
    widths, plain_widths = SYMMETRIC_WIDTHS, (*SYMMETRIC_WIDTHS, 34.0)
    gaussian_loss = 2.87e-4

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        n = len(blocks)
        low = blocks[:, :128].unflatten(1, (2, 2, 32))
        high = blocks[:, 128:192].unflatten(1, (2, 32))
        codes = torch.cat([low & 0x0F, low >> 4], 2)  # [n, 2, 4, 32]
        for run in range(4):
            codes[:, :, run] |= ((high >> (2 * run)) & 3) << 4
        scale, _ = self.grid(blocks)
        groups = out.view(n, 16, 16)
        groups.copy_(codes.sub_(32).view(torch.int8).view(n, 16, 16))  # wraps to two's complement
        groups.mul_(scale[:, :, None])

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        return half_field(blocks, 104) * blocks[:, 192:208].view(torch.int8), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        fields = self._pack_codes((codes + 32).view(torch.uint8).view(-1, 2, 4, 32))
        return torch.cat([*fields, blocks[:, 192:]], 1)

    def encode_as_ggml(self, weights: Tensor) -> Tensor:
        x = columns_of(weights, self.group)
        fit = ggml.fit_symmetric(x.view(16, -1), (x * x).view(16, -1), 32)
        group_scale, group_inverse, negligible = (field.view(x.shape[1:]) for field in fit)
        d, scale, empty = steps_to_peak(group_scale, -128)
        step = as_stored(d) * scale  # [16, n]
        codes = torch.where(step != 0, x / step, x * group_inverse).round_()
        codes = codes.clamp_(-32, 31).masked_fill_(negligible | empty, -32)
        return self._pack(StoredFit(d, scale), rows_of(codes.to(torch.int8)))

    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        """Codes are stored from zero up."""
        fields = self._pack_codes((codes + 32).view(torch.uint8).view(-1, 2, 4, 32))
        scale = fit.scale.t().to(torch.int8).view(torch.uint8)
        return torch.cat([*fields, scale, half_bytes(fit.d)], 1)

    @staticmethod
    def _pack_codes(codes: Tensor) -> list[Tensor]:
        """uint8 [n, 2, 4, 32] -> ql [n, 128], qh [n, 64]."""
        words = codes.view(torch.int64)
        low = words & 0x0F * EACH_BYTE
        low = low[:, :, :2] | (low[:, :, 2:] << 4)
        high = (words >> 4) & 0x03 * EACH_BYTE
        packed = high[:, :, 0].clone()
        for run in range(1, 4):
            packed |= high[:, :, run] << (2 * run)
        return [low.view(torch.uint8).flatten(1), packed.view(torch.uint8).flatten(1)]


def _plain_weights(x: Tensor) -> Tensor:
    """``rms(group) + |x|``: large weights count more."""
    return x.abs().add_(square_root(divide(ordered_sum(x * x), 32.0)))
