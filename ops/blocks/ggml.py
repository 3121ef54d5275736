"""ggml's own searches for the scales of K-quant blocks, over many blocks at a time.

Every function works on columns: dimension 0 runs over the weights of one group (16 or 32) or over
the groups of one block (8), the other dimension over independent problems, so that each step is
one elementwise operation over contiguous memory. Only +, -, *, /, sqrt and rounding are used, in
float32 and in ggml's order, sums included: the result is the same on every machine and equal to
that of ggml's C code compiled without fused multiply-add (as its base library is).
Source: make_qkx2_quants, make_qx_quants in ggml-quants.c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import uninitialised
from .base import divide, signed_peak
from .columns import ordered_sum

NEGLIGIBLE = 1e-15  # groups whose largest magnitude is below are zero

# Of blocks like no gaussian one, see worth_trying.
FEW = 24.0  # loud weights hold their energy; of 256 gaussian ones it is as if 85 did
USUAL_LOSS = (0.5, 4.0)  # times the loss of gaussian blocks; heavy tails lose up to three times it


class AffineFit(NamedTuple):
    """``x ~ scale * code - offset``; the search's code is round((x - base) * inverse), clamped."""

    scale: Tensor
    offset: Tensor
    inverse: Tensor
    base: Tensor


class SymmetricFit(NamedTuple):
    """``x ~ scale * code``; the search's code is round(x * inverse), clamped."""

    scale: Tensor
    inverse: Tensor
    negligible: Tensor  # bool: all weights of the group are as good as zero


def grid(count: int, first: float, step: float, top: int) -> Tensor:
    """``step * i + first + top`` for i < count, each operation rounded to float32."""
    return torch.arange(count, dtype=torch.float32, device="cpu") * step + first + top


def fit_affine(x: Tensor, weight: Tensor, top: int, ranges: Tensor) -> AffineFit:
    """argmin over scale >= 0, offset >= 0 of sum weight * (scale * code - offset - x)^2.

    x, weight: [32, n]; codes 0 .. top; the fit is [n]. Each entry of ``ranges`` spreads the codes
    over that many steps between the group's minimum and maximum, solves the weighted least
    squares for scale and minimum, and is kept where the error falls. Later entries start from the
    minimum kept so far.
    """
    high, low = x.amax(0), x.amin(0).clamp_(max=0)
    flat = high <= low
    size, n = x.shape
    buffer = uninitialised((5 * size, n), x.dtype, x.device)
    code, residual = buffer[:size], buffer[size : 2 * size]
    products = buffer[2 * size :].view(size, 3, n)  # weight * code * (1, code, x)
    sum_w, sum_x = ordered_sum(weight), ordered_sum(weight * x)

    def round_codes(inverse: Tensor, base: Tensor) -> None:
        torch.sub(x, base, out=code).mul_(inverse).round_().clamp_(0, top)

    def error(scale: Tensor, base: Tensor) -> Tensor:
        torch.mul(code, scale, out=residual).add_(base).sub_(x)
        return ordered_sum(residual.mul_(residual).mul_(weight))

    inverse, base = divide(float(top), high - low), low
    scale, start = inverse.reciprocal(), low  # codes are counted from start, x ~ scale*code + base
    round_codes(inverse, base)
    best = error(scale, base)
    for codes_wide in ranges.to(x.device).unbind(0):
        trial_inverse = codes_wide / (high - base)
        round_codes(trial_inverse, base)
        weighted = torch.mul(weight, code, out=products[:, 0])
        torch.mul(weighted, code, out=products[:, 1])
        torch.mul(weighted, x, out=products[:, 2])
        sum_l, sum_l2, sum_xl = ordered_sum(products).unbind(0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        trial_base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = trial_base > 0
        trial_base = trial_base.masked_fill_(above, 0)
        trial_scale = torch.where(above, sum_xl / sum_l2, trial_scale)
        trial_error = error(trial_scale, trial_base)
        better = (determinant > 0) & (trial_error < best)
        best = torch.where(better, trial_error, best)
        scale = torch.where(better, trial_scale, scale)
        inverse = torch.where(better, trial_inverse, inverse)
        start = torch.where(better, base, start)
        base = torch.where(better, trial_base, base)
    scale, base = scale.masked_fill_(flat, 0), torch.where(flat, low, base)
    return AffineFit(scale, -base, inverse.masked_fill_(flat | inverse.isinf(), 0), start)


def fit_symmetric(x: Tensor, weight: Tensor, half: int) -> SymmetricFit:
    """argmax over scale of (sum weight * x * code)^2 / sum weight * code^2: the least error.

    x, weight: [16, n]; codes -half .. half - 1, the peak near -half; the fit is [n]. Nineteen
    steps, half +- 0.1 * i to the peak, are tried.
    """
    peak = signed_peak(x, 0)
    negligible = peak.abs() < NEGLIGIBLE
    size, n = x.shape
    buffer = uninitialised((4 * size, n), x.dtype, x.device)
    code, products = buffer[:size], buffer[2 * size :].view(size, 2, n)
    weighted = torch.mul(weight, x, out=buffer[size : 2 * size])

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(x, inverse, out=code).round_().clamp_(-half, half - 1)
        torch.mul(weighted, code, out=products[:, 0])
        torch.mul(weight, code, out=products[:, 1]).mul_(code)
        sum_xl, sum_l2 = ordered_sum(products).unbind(0)
        return sum_xl, sum_l2

    inverse = divide(float(-half), peak)
    sum_xl, sum_l2 = sums(inverse)
    scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, 0)
    best = scale * sum_xl
    steps = torch.arange(-9, 10, dtype=torch.float32, device=x.device) * 0.1 + half
    for number, codes_wide in enumerate(steps.neg().unbind(0), start=-9):
        if number == 0:
            continue
        trial_inverse = codes_wide / peak
        sum_xl, sum_l2 = sums(trial_inverse)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        trial_scale = sum_xl / sum_l2
        best = torch.where(better, trial_scale * sum_xl, best)
        scale = torch.where(better, trial_scale, scale)
        inverse = torch.where(better, trial_inverse, inverse)
    return SymmetricFit(scale.masked_fill_(negligible, 0), inverse, negligible)


def worth_trying(x: Tensor, loss: Tensor) -> Tensor:
    """Whether a block may be nearer as ggml makes it: bool [n]; x [group, groups, n].

    loss: [n], the squared error of a least-squares search, in gaussian blocks' share of the energy.

    How well float16 steps meet a few loud weights decides, or that they hardly reach tiny ones, or
    that codes hit weights of few values: luck, and no search leads to it.
    """
    squares = x * x
    energy = ordered_sum(ordered_sum(squares))
    fourth = ordered_sum(ordered_sum(squares.square_()))
    few = fourth * FEW > energy.square()
    least, most = USUAL_LOSS
    return few | (loss < energy * least) | (loss > energy * most)
