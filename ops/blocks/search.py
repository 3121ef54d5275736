"""Searches for the scales of K-quants and Q8_0, over many blocks at a time: least squares.

Every function works on columns: dimension 0 runs over the weights of one group (16 or 32), the
others over independent problems, so that each step is one elementwise operation over contiguous
memory. Only +, -, *, / and rounding are used, in float32, and sums run in a fixed order: the result
is the same on every machine.

A trial lays a grid of codes over the group and solves for the scale (and minimum) of least error
with these codes. What the solution takes off the sum of squares follows from the sums that it is
solved from, so that a trial takes one pass to round and one to sum. ggml weighs the weights by
their size and takes twice the trials and passes (see ``ggml``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import Codes, round_codes_
from .base import signed_peak
from .columns import bind_choice, bind_sum, ordered_sum

# Gains that differ by less are one: groups that any codes fit (of two values, say) then agree on
# the first ones, and their scales on one step for the block.
MORE = 1 + 1e-6


class _Affine(NamedTuple):
    """``x ~ scale * code + base`` and what it takes off sum importance * x^2."""

    gain: Tensor
    scale: Tensor
    base: Tensor


def fit_affine(
    x: Tensor, importance: Tensor | None, top: int, widths: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """(scale, offset) [...] of least sum importance * (scale * code - offset - x)^2, both >= 0.

    x, importance: [32, ...], None for equal ones; codes 0 .. top. Each of ``widths`` spreads the
    codes over that many steps between the minimum kept so far and the group's maximum.
    """
    search = _AffineSearch(x, importance, top)
    for width in widths:
        search.attempt(x.new_full((), width))
    return search.kept.scale, search.kept.base.neg()


class _AffineSearch:
    """State and buffers of ``fit_affine``. Views are bound once: one costs as much as a row."""

    def __init__(self, x: Tensor, importance: Tensor | None, top: int) -> None:
        self.x, self.importance, self.top = x, importance, top
        self.high, low = x.amax(0), x.amin(0).clamp_(max=0)
        products = x.new_empty(len(x), 3, *x.shape[1:])
        self.w_l, self.w_l2, self.w_xl = products.unbind(1)  # importance * (code, code^2, x * code)
        self.code = self.w_l if importance is None else torch.empty_like(x)
        self.weighted = x if importance is None else importance * x
        self.sum_x = ordered_sum(self.weighted)
        count = x.new_full((), len(x))
        self.sum_w = count if importance is None else ordered_sum(importance)
        rows = x.new_empty(14, *low.shape)
        self.kept, self.trial = _Affine(*rows[:3]), _Affine(*rows[3:6])
        self.sum_l, self.sum_l2, self.sum_xl = rows[6:9]
        self.determinant, self.through_zero, self.spare, self.flags, self.inverse = rows[9:]
        self.zero = x.new_zeros(())
        self.regular = x.new_full((), 1e-5)
        self.sum_products = bind_sum(products, rows[6:9])
        self.keep_better = bind_choice(self.flags, rows[3:6], rows[:3])
        self.pass_zero = bind_choice(self.flags, self.through_zero, self.trial.scale)
        self.kept.gain.fill_(-torch.inf)
        torch.div(self.high - low, x.new_full((), float(top)), out=self.kept.scale)
        self.kept.base.copy_(low)

    def attempt(self, width: Tensor) -> None:
        """Spread ``width`` steps between base and high; keep their fit where it gains more."""
        trial, kept = self.trial, self.kept
        torch.div(width, torch.sub(self.high, kept.base, out=self.spare), out=self.inverse)
        code = torch.sub(self.x, kept.base, out=self.code).mul_(self.inverse)
        code.round_().clamp_(0, self.top)
        self._solve()
        torch.mul(trial.scale, self.sum_xl, out=trial.gain)
        trial.gain.add_(torch.mul(trial.base, self.sum_x, out=self.spare))
        torch.gt(trial.gain, torch.mul(kept.gain, MORE, out=self.spare), out=self.flags)
        # All codes alike leave a determinant that is nothing but rounding.
        least = torch.mul(self.sum_w, self.sum_l2, out=self.spare).mul_(self.regular)
        self.flags.mul_(torch.gt(self.determinant, least, out=least))
        self.keep_better()

    def _solve(self) -> None:
        """Scale and base of least error for the codes; base is at most zero."""
        trial, determinant = self.trial, self.determinant
        if self.importance is not None:
            torch.mul(self.importance, self.code, out=self.w_l)
        torch.mul(self.w_l, self.code, out=self.w_l2)
        torch.mul(self.weighted, self.code, out=self.w_xl)
        self.sum_products()
        sum_w, sum_x = self.sum_w, self.sum_x
        sum_l, sum_l2, sum_xl = self.sum_l, self.sum_l2, self.sum_xl
        self._cross(sum_w, sum_l2, sum_l, sum_l, out=determinant)
        self._cross(sum_w, sum_xl, sum_x, sum_l, out=trial.scale).div_(determinant)
        self._cross(sum_l2, sum_x, sum_l, sum_xl, out=trial.base).div_(determinant)
        torch.gt(trial.base, self.zero, out=self.flags)
        trial.base.clamp_(max=0)
        torch.div(sum_xl, sum_l2, out=self.through_zero)
        self.pass_zero()

    def _cross(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor) -> Tensor:
        """a * b - c * d."""
        return torch.mul(a, b, out=out).sub_(torch.mul(c, d, out=self.spare))


def fit_symmetric(
    x: Tensor, importance: Tensor | None, codes: Codes, widths: tuple[float, ...]
) -> Tensor:
    """Scale [...] of least sum importance * (scale * code - x)^2, with codes among ``codes``.

    x, importance: [weights of a group, ...], None for equal ones. Each of ``widths`` puts the peak
    that many steps from zero, below it, or above for a negative one.
    """
    peak = signed_peak(x, 0)
    weighted = x if importance is None else importance * x
    products = x.new_empty(len(x), 2, *x.shape[1:])
    w_xl, w_l2 = products.unbind(1)
    code = torch.empty_like(x)
    rows = x.new_empty(8, *peak.shape)
    kept, trial, sums = rows[:2].zero_(), rows[2:4], rows[4:6]  # (gain, scale) each
    gain, scale = trial
    sum_xl, sum_l2 = sums
    inverse, better = rows[6:]
    sum_products, keep_better = bind_sum(products, sums), bind_choice(better, trial, kept)
    for width in widths:
        torch.div(x.new_full((), -width), peak, out=inverse)
        round_codes_(torch.mul(x, inverse, out=code), codes)
        torch.mul(weighted, code, out=w_xl)
        torch.mul(code, code, out=w_l2)
        if importance is not None:
            w_l2.mul_(importance)
        sum_products()
        torch.div(sum_xl, sum_l2, out=scale)
        torch.mul(scale, sum_xl, out=gain)
        torch.gt(gain, torch.mul(kept[0], MORE, out=inverse), out=better)
        keep_better()
    return kept[1]
