"""Formats whose four-bit codes are places in a table: IQ4_NL, IQ4_XS and MXFP4.

    byte     0    1       2           4            8            17   18           136
    MXFP4    e    qs[16]                                        |
    IQ4_NL   d            qs[16]                                     |
    IQ4_XS   d            scales_h    scales_l[4]  qs[8][16]                      |

    qs[j] = qqqqQQQQ    Q: the place of weight j of 32, q: that of weight j + 16

d is float16, T a table. Weight i is ``d * T[q]`` in IQ4_NL, ``d * (sc - 32) * T[q]`` in IQ4_XS (8
groups of 32; the low four bits of sc are a nibble of scales_l, low nibble first, the high two the
bits 2 g and 2 g + 1 of the little-endian scales_h), and ``2 ** (e - 128) * T[q]`` in MXFP4, whose
table is the values of e2m1 doubled.
Source: kvalues_mxfp4 in ggml-common.h; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..codes import IQ4, Codebook
from .base import half_bytes, half_field
from .coded import CodedFormat
from .columns import every_row, ordered_sum
from .kquant_search import SymmetricK
from .refine import Limits, StoredFit, as_stored, best_codes, refine
from .search import fit_symmetric

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M1_CODES = Codebook(tuple(sorted(set(E2M1))))

# Entries that the search puts a block's peak at, as numbers below zero; negative ones above: the
# table reaches further down than up, and is finer below. Beyond its ends the peak is clipped.
IQ4_WIDTHS = (104.0, 112.0, 118.0, 122.0, 126.0, 130.0, 135.0, 142.0, 150.0)
IQ4_WIDTHS += (-92.0, -99.0, -104.0, -108.0, -112.0, -116.0, -121.0, -127.0, -135.0)
# Without importance ten of them cost 0.15 % of the error, with it 0.9 %.
PLAIN_IQ4_WIDTHS = (108.0, 117.0, 124.0, 130.0, 140.0, -96.0, -104.0, -110.0, -116.0, -125.0)


class IQ4_NL(CodedFormat):
    name, ggml_type, block_size, type_size, code_limits = "IQ4_NL", 20, 32, 18, IQ4
    knows_ggml = False

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        _look_up(blocks[:, 2:], IQ4.values, half_field(blocks, 0), out)

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        return half_field(blocks, 0), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([blocks[:, :2], _pack(IQ4.places(codes))], 1)

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        x = weights.t().contiguous()[:, None]  # [32, 1, n]
        if importance is not None:
            importance = every_row(importance.t().contiguous()[:, None], x)
        widths = PLAIN_IQ4_WIDTHS if importance is None else IQ4_WIDTHS
        scale = fit_symmetric(x, importance, IQ4, widths)
        fit = StoredFit(as_stored(scale[0]), torch.ones_like(scale))
        fit = refine(x, importance, fit, Limits(IQ4))
        codes = best_codes(x, fit, IQ4)[:, 0].t().to(torch.int8)
        return torch.cat([half_bytes(fit.d), _pack(IQ4.places(codes))], 1)


class IQ4_XS(SymmetricK):
    name, ggml_type, type_size, code_limits = "IQ4_XS", 23, 136, IQ4
    knows_ggml = False
    group, scale_limits = 32, (-32, 31)
    widths, plain_widths = IQ4_WIDTHS, PLAIN_IQ4_WIDTHS
    moves = plain_moves = (-1, 1)

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        step = self.grid(blocks)[0]
        packed = blocks[:, 8:].reshape(-1, 8, 16)
        _look_up(packed, IQ4.values, step[:, :, None], out.view(-1, 8, 32))

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        low, high = blocks[:, 4:8], blocks[:, 2:4]
        low = torch.stack([low & 15, low >> 4], 2).flatten(1)
        high = torch.stack([(high >> (2 * each)) & 3 for each in range(4)], 2).flatten(1)
        scale = (low | (high << 4)).view(torch.int8) - 32
        return half_field(blocks, 0) * scale.float(), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        packed = _pack(IQ4.places(codes).view(-1, 8, 32)).flatten(1)
        return torch.cat([blocks[:, :8], packed], 1)

    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        scale = (fit.scale.t() + 32).to(torch.uint8)
        low = (scale[:, 0::2] & 15) | ((scale[:, 1::2] & 15) << 4)
        high = (scale >> 4).view(-1, 2, 4)
        high = high[..., 0] | (high[..., 1] << 2) | (high[..., 2] << 4) | (high[..., 3] << 6)
        packed = _pack(IQ4.places(codes)).flatten(1)
        return torch.cat([half_bytes(fit.d), high, low, packed], 1)


class MXFP4(CodedFormat):
    """Steps are powers of two, so there is nothing to search but which of two."""

    name, ggml_type, block_size, type_size, code_limits = "MXFP4", 39, 32, 17, _E2M1_CODES
    uses_importance = knows_ggml = False

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        _look_up(blocks[:, 1:], E2M1, self.grid(blocks)[0], out)

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        x = weights.t().contiguous()  # [32, n]
        peak = x.abs().amax(0)
        # The peak at 4 to 8 units, of which e2m1 reaches 6; a power more clips none.
        power = torch.where(peak == 0, 0, torch.frexp(peak).exponent + 124).clamp_(0, 254)
        x = x / _power(power)  # exact
        codes, coarse = (_E2M1_CODES.nearest_(x / step) for step in (1.0, 2.0))
        lost, lost_coarse = (ordered_sum(each.sub(x).square_()) for each in (codes, 2 * coarse))
        better = lost_coarse < lost
        power, codes = power + better, torch.where(better, coarse, codes)
        places = _e2m1_places(codes.t().to(torch.int8))
        return torch.cat([power.to(torch.uint8)[:, None], _pack(places)], 1)

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        return _power(blocks[:, :1].to(torch.int32)), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([blocks[:, :1], _pack(_e2m1_places(codes))], 1)


def _e2m1_places(codes: Tensor) -> Tensor:
    """The place in the table of each of ``codes`` int8: uint8."""
    place = _E2M1_CODES.places(codes)  # of -12 .. 12, with zero in the middle
    return torch.where(place < 7, 15 - place, place - 7)


def _power(exponent: Tensor) -> Tensor:
    """``2 ** (exponent - 128)`` of int32 0 .. 255, exact: float32, subnormal for the first two."""
    small = 0x00200000 * (exponent.clamp(max=1) + 1)
    return torch.where(exponent < 2, small, (exponent - 1) << 23).view(torch.float32)


def _look_up(packed: Tensor, table: tuple[int, ...], step: Tensor, out: Tensor) -> None:
    """``out [..., 32] = step * table[place]`` of places ``packed`` uint8 [..., 16].

    Whole bytes are looked up, in a table for their low nibbles and in one for their high ones.
    """
    values = _table(table, packed.device)
    at = packed.reshape(-1).to(torch.int32)
    for side, each in enumerate((values.repeat(16), values.repeat_interleave(16))):
        found = each.index_select(0, at).view(packed.shape)
        out[..., 16 * side : 16 * side + 16].copy_(found.mul_(step))


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [16] of int8 ``values``, from two numbers: nothing is copied from the host."""
    words = np.array(values, dtype=np.int8).view(np.int64).tolist()
    halves = [torch.full((1,), word, dtype=torch.int64, device=device) for word in words]
    return torch.cat(halves).view(torch.int8).to(torch.float32)


def _pack(places: Tensor) -> Tensor:
    """uint8 [..., 32] of 0 to 15 -> [..., 16]."""
    return places[..., :16] | (places[..., 16:] << 4)
