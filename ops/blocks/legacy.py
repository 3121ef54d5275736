"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: 32 weights, one float16 scale, with ``_1`` one float16 minimum.

    byte    0     2     4                        Weight i of a block is
    Q8_0    d     q0 ... q31 (int8)              d * q
    Q4_0    d     qs[16]                         d * (q - 8)
    Q4_1    d     m     qs[16]                   d * q + m
    Q5_0    d     qh[4]       qs[16]             d * (q - 16)
    Q5_1    d     m     qh[4]       qs[16]       d * q + m

    qs[j] = qqqqQQQQ    Q: low four bits of code j, q: of code j + 16
    qh    = bit i of the little-endian 32-bit word is the fifth bit of code i

Encoding gives the bytes of gguf-py (those of ggml's reference quantizers but for the sign of a
zero scale), except that a block scale beyond float16 is refused and not stored as infinity, that
blocks so small that 1 / scale overflows (below 1e-37, all decoded as zero) get the codes of zero,
and that a zero minimum may have either sign in a block with zeros of both.

With importance the scale is searched and the best start refined (ggml does the like for the 4- and
5-bit formats, less closely).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import divide, half_bytes, half_field, signed_peak
from .coded import CodedFormat
from .columns import every_row
from .ggml import fit_affine, grid
from .refine import Limits, StoredFit, as_stored, best_codes, choose, group_errors, refine, settle
from .search import fit_symmetric

# Added to |x| before truncation it rounds halves up: x + 0.5 would also round 0.49999997 up.
BELOW_HALF = 0.5 - 2.0**-25  # the float32 before 0.5

# With importance: steps that are tried. Wider ones come out best by luck (a scale that suits the
# columns that count), and narrower ones clip the peak, which pays where codes are few.
FINE_WIDTHS = tuple(1.27 * number for number in range(90, 103))  # steps to the peak
COARSE_STEPS = tuple(1 + 0.03 * number for number in range(-7, 4))  # as shares of the plain one


class _Legacy(CodedFormat):
    block_size = 32


class Q8_0(_Legacy):
    """``d * q`` with q = round(w / d), d = absmax / 127."""

    name, ggml_type, type_size, code_limits = "Q8_0", 8, 34, (-127, 127)

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks[:, 2:].view(torch.int8))
        out.mul_(half_field(blocks, 0))

    def grid(self, blocks: Tensor) -> tuple[Tensor, None]:
        return half_field(blocks, 0), None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([blocks[:, :2], codes.view(torch.uint8)], 1)

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        if importance is None:
            scale = divide(weights.abs().amax(1), 127.0)
            codes = weights * _inverse(scale)
            codes += codes.sign().mul_(BELOW_HALF)
        else:
            scale, codes = self._weighted(weights, importance)
        return torch.cat([half_bytes(scale), codes.to(torch.int8).view(torch.uint8)], 1)

    def _weighted(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scale [n] and codes [n, 32] of the least output error that the search finds."""
        x = _columns(weights)
        importance = every_row(_columns(importance), x)
        scale = fit_symmetric(x, importance, self.code_limits, FINE_WIDTHS)
        fit = StoredFit(as_stored(scale[0]), torch.ones_like(scale))
        fit = settle(x, importance, fit, self.code_limits)
        return fit.d, best_codes(x, fit, self.code_limits)[:, 0].t().contiguous()


class _Packed(_Legacy):
    """Four or five bits a code, centred (``_0``) or above a minimum (``_1``)."""

    bits: ClassVar[int]
    has_minimum: ClassVar[bool]

    @property
    def code_limits(self) -> tuple[int, int]:
        middle = 0 if self.has_minimum else 1 << (self.bits - 1)
        return -middle, (1 << self.bits) - 1 - middle

    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return half_field(blocks, 0), -half_field(blocks, 1) if self.has_minimum else None

    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        head = blocks[:, : 4 if self.has_minimum else 2]
        return torch.cat(
            [head, *self._pack_codes((codes - self.code_limits[0]).view(torch.uint8))], 1
        )

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        high_at = 4 if self.has_minimum else 2
        low_at = high_at if self.bits == 4 else high_at + 4
        codes = _unpack_nibbles(blocks[:, low_at:])
        if self.bits == 5:
            codes |= _unpack_fifth_bits(blocks[:, high_at:low_at])
        if not self.has_minimum:
            codes = codes.sub_(1 << (self.bits - 1)).view(torch.int8)  # wraps to two's complement
        out.copy_(codes)
        out.mul_(half_field(blocks, 0))
        if self.has_minimum:
            out.add_(half_field(blocks, 1))

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        if importance is None:
            scale, low, codes = self._plain(weights)
        else:
            scale, low, codes = self._weighted(weights, importance)
        fields = [half_bytes(scale)] if low is None else [half_bytes(scale), half_bytes(low)]
        return torch.cat([*fields, *self._pack_codes(codes)], 1)

    def _pack_codes(self, codes: Tensor) -> list[Tensor]:
        """The fields after the scales, of codes uint8 [n, 32]."""
        high = [_pack_fifth_bits(codes)] if self.bits == 5 else []
        return [*high, _pack_nibbles(codes)]

    def _plain(self, weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scale [n], minimum [n] or None, codes uint8 [n, 32]."""
        top = (1 << self.bits) - 1
        if self.has_minimum:
            low = weights.amin(1)
            scale = divide(weights.amax(1) - low, float(top))
            value = (weights - low[:, None]).mul_(_inverse(scale)).add_(0.5)
        else:
            low, middle = None, 1 << (self.bits - 1)
            scale = divide(signed_peak(weights, 1), float(-middle))  # the peak gets code 0
            value = (weights * _inverse(scale)).add_(middle + 0.5)
        return scale, low, value.clamp_(0, top).to(torch.uint8)

    def _weighted(
        self, weights: Tensor, importance: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As ``_plain``, with the least output error that the search finds."""
        if self.has_minimum:
            low, high = weights.amin(1), weights.amax(1)
            top = (1 << self.bits) - 1
            width = high - low
            starts = [
                (divide(width * share, float(top)), -(low + width * ((1 - share) / 2)))
                for share in COARSE_STEPS
            ]
            x = weights.t().contiguous()
            by_weight = every_row(importance.t().contiguous(), x)
            fit = fit_affine(x, by_weight, top, grid(19, -0.9, 0.1, top))
            starts.append((fit.scale, fit.offset))
            scale, minimum, codes = _search(weights, importance, starts, (0, top))
            return scale, -minimum, codes.to(torch.uint8)
        middle = 1 << (self.bits - 1)
        peak = divide(signed_peak(weights, 1), float(-middle))
        starts = [(peak * share, None) for share in COARSE_STEPS]
        scale, _, codes = _search(weights, importance, starts, (-middle, middle - 1))
        return scale, None, codes.add_(middle).to(torch.uint8)


class Q4_0(_Packed):
    name, ggml_type, type_size, bits, has_minimum = "Q4_0", 2, 18, 4, False


class Q4_1(_Packed):
    name, ggml_type, type_size, bits, has_minimum = "Q4_1", 3, 20, 4, True


class Q5_0(_Packed):
    name, ggml_type, type_size, bits, has_minimum = "Q5_0", 6, 22, 5, False


class Q5_1(_Packed):
    name, ggml_type, type_size, bits, has_minimum = "Q5_1", 7, 24, 5, True


def _search(
    weights: Tensor,
    importance: Tensor,
    starts: list[tuple[Tensor, Tensor | None]],
    limits: tuple[int, int],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d [n], dmin [n] and codes [n, 32] of ``d * code - dmin``: the best start, refined."""
    x = _columns(weights)
    importance = every_row(_columns(importance), x)
    one = torch.ones_like(x[0])
    best: StoredFit | None = None
    for d, dmin in starts:
        trial = StoredFit(as_stored(d), one)
        if dmin is not None:
            trial = trial._replace(dmin=as_stored(dmin), minimum=one)
        trial_error = group_errors(x, importance, trial, best_codes(x, trial, limits))[0]
        if best is None:
            best, error = trial, trial_error
            continue
        better = trial_error < error
        error = torch.where(better, trial_error, error)
        best = choose(better, trial, best)
    fit = refine(x, importance, best, Limits(limits))
    return fit.d, fit.dmin, best_codes(x, fit, limits)[:, 0].t().contiguous()


def _columns(blocks: Tensor) -> Tensor:
    """[n, 32] -> [32, 1, n] contiguous: one group a block."""
    return blocks.t().contiguous()[:, None]


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale`` [n, 1]; zero where the scale is zero or so small that 1 / scale overflows.

    Such blocks decode to a constant whatever their codes are: their float16 scale is zero.
    """
    inverse = scale.reciprocal()
    return torch.where(inverse.isinf(), 0.0, inverse)[:, None]


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """[n, 16] -> uint8 [n, 32]."""
    return torch.cat([packed & 0x0F, packed >> 4], 1)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """The low four bits of uint8 [n, 32] -> [n, 16]."""
    return (codes[:, :16] & 0x0F) | (codes[:, 16:] << 4)


def _unpack_fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] -> uint8 [n, 32] of 0 or 16: a table gives the eight bytes of eight bits at once."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    values = torch.arange(256, device=packed.device).to(torch.uint8)
    table = (((values[:, None] >> bits) & 1) << 4).view(torch.int64).view(256)
    words = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return words.view(torch.uint8).view(len(packed), 32)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of uint8 [n, 32] -> [n, 4]."""
    bits = (codes >> 4).view(len(codes), 4, 8)
    packed = bits[..., 0].clone()
    for position in range(1, 8):
        packed |= bits[..., position] << position
    return packed
