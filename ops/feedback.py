"""Rounding with error feedback: the errors of correlated inputs are made to cancel.

A linear's output error is ``e^T C e`` for the error e of a row of its weight and C = E[x x^T] of
its inputs. Rounding each weight on its own looks at the diagonal of C alone. GPTQ (arXiv
2210.17323) rounds column after column and lets the later ones make up for what the earlier ones
lost; its C has K^2 values, 600 MB for the widest linears here. With ``C ~ diag(rest) + V V^T`` of a
few directions V, K * r values, the same is exact at r products a weight: all that later columns
need to know of the earlier ones is ``p = V^T e``.

Columns are rounded a panel at a time, each to the nearest code once the best make-up of the whole
panel for p is taken off: two products of matrices a panel, where a column on its own costs a dozen
calls. Errors of a panel are made up for by those after it, of which there are enough.

A product's order of sums is a library's own, and differs with shapes, threads and machines. Here
every product is exact: both factors are rounded to so few bits that all sums are whole numbers of
some unit, below 2^53 of them, which fp64 holds. Codes then depend on the arguments alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import OpError
from .chunks import uninitialised
from .codes import Codes, Levels, round_codes_
from .wide import has_float64

# Directions explain at most this much of a column: other prompts bring other inputs.
MOST_SHARED = 0.95

# Columns of a panel at most, as a share of all, and of those before it: loud ones are few, and each
# has much to make up for. On the pocket model's few columns error grows by 0.08 dB on average
# (bench_importance.py).
_OF_ALL = 1 / 48
_OF_EARLIER = 1 / 2

# Bits of one factor of a product; the other's are those that 53 leave for so many terms.
_FACTOR_BITS = 16
# The unit of errors, as a share of their row's largest step, both weighed by the inputs' loudness.
_UNIT = 2.0**-18

# Share of the expected error that a row has to keep to be the better one: beyond any rounding.
_LESS = 0.999


def output_energy(rows: Tensor, rest: Tensor, directions: Tensor) -> Tensor:
    """``r^T (diag(rest) + V V^T) r`` of each row of ``rows`` [N, K]: fp32 [N], fp64 of fp64 rows.

    Of a weight: the mean square of its outputs; of a weight's error: that of the outputs' error.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    own = rows.square() @ rest.to(rows)
    return own + (rows @ directions.to(rows)).square().sum(1)


class _Panel(NamedTuple):
    """Columns that are rounded at once, and how; their errors are weighed by loudness."""

    place: Tensor  # int64 [B]: the columns
    loudness: Tensor  # fp32 [B, 1]: powers of two, over the unit of errors
    gains: Tensor  # fp64 [B, r], in few bits: what makes up for p is -gains . p
    directions: Tensor  # fp64 [r, B], in few bits: what errors add to p
    own: Tensor  # fp32 [B, 1]: the square root of rest


class Feedback:
    """Codes of least ``sum rest * e^2 + |V^T e|^2``, panel after panel, loudest inputs first.

    square: [K], the mean square of each input, above zero; directions: V [K, r], so that
    ``E[x x^T] ~ diag(rest) + V V^T`` has that diagonal. Raises OpError for other shapes or values.
    """

    def __init__(self, square: Tensor, directions: Tensor) -> None:
        _check(square, directions)
        square, shared = square.cpu().double(), directions.cpu().double()
        rest = square - _fold(shared.square()[None].transpose(1, 2))[0]
        rest = torch.maximum(rest, square * (1 - MOST_SHARED))
        self.rest = rest.float()
        self.directions = shared.float()
        self._loudness = _power_above(torch.maximum(_root(square), shared.abs().amax(1)))
        place = square.argsort(descending=True, stable=True)
        self.order: list[int] = place.tolist()
        self._panels = self._prepare(place, rest[place, None], shared[place])

    def _prepare(self, place: Tensor, rest: Tensor, shared: Tensor) -> list[_Panel]:
        panels = _panels(len(place))
        loudness = self._loudness[place, None]
        gains = _gains(rest.numpy(), shared.numpy(), panels)
        gains = _coarse(gains, _power_above(gains.abs().amax(1, keepdim=True))) * _UNIT
        directions = _coarse(shared / loudness, torch.ones_like(loudness))
        own, loudness = (_root(rest) / loudness).float(), (loudness / _UNIT).float()
        return [
            _Panel(place[at], loudness[at], gains[at], directions[at].t(), own[at]) for at in panels
        ]

    def round(
        self, weight: Tensor, step: Tensor, shift: Tensor | None, levels: Codes | Levels
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] of ``weight``, and whether less error is expected of them than of the
        nearest codes, bool [N].

        weight: fp32 [N, K]; step, shift: fp32 [N, G], one value a run of K // G columns: a reader
        takes codes for ``step * code - shift``, or with :class:`Levels` for ``step * level -
        shift``. They stay within their limits; rows that lose by it, as a scale clips columns of
        little importance, are not the better ones. The result depends on nothing but the
        arguments, not on the other rows, threads or the device.
        """
        unit = self._row_unit(step)
        wanted = uninitialised(weight.t().shape, weight.dtype, weight.device)
        wanted.copy_(weight.t()).mul_(unit)  # turned: a column is a run of memory
        step = (step * unit[:, None]).t().contiguous()
        if shift is not None:
            wanted.unflatten(0, (len(step), -1)).add_((shift.t() * unit)[:, None])
        place = weight.device if has_float64(weight.device) else torch.device("cpu")
        levels = levels.on(place) if isinstance(levels, Levels) else levels
        codes, (lost, lost_by_nearest) = self._follow(wanted.to(place), step.to(place), levels)
        codes = codes.index_select(0, torch.tensor(self.order, device=codes.device).argsort())
        better = lost < _LESS * lost_by_nearest
        return codes.t().contiguous().to(weight.device), better.to(weight.device)

    def _row_unit(self, step: Tensor) -> Tensor:
        """Powers of two [N] that bring each row's largest step, by loudness, to below one."""
        loudest = self._loudness.view(step.shape[1], -1).amax(1).to(step)
        exponent = torch.frexp((step.abs() * loudest).amax(1)).exponent
        return torch.ldexp(torch.ones_like(step[:, 0]), -exponent.clamp(-126, 126))

    def _follow(
        self, wanted: Tensor, step: Tensor, levels: Codes | Levels
    ) -> tuple[Tensor, Tensor]:
        """Codes [K, N], loudest columns first; the error that is expected of them, and of the
        nearest ones, [2, N]. wanted, step: [K, N] and [G, N].

        Both are followed side by side, in memory that is bound once: fresh one takes longer than
        what is done in it.
        """
        (k, n), device = wanted.shape, wanted.device
        inverse = step.reciprocal()
        inverse.masked_fill_(inverse.isinf(), 0)  # such steps decode to -shift whatever the code
        codes = torch.empty_like(wanted, dtype=torch.int8)
        p = wanted.new_zeros((2, self.directions.shape[1], n), dtype=torch.float64)
        sizes = [len(panel.place) for panel in self._panels]
        energy, values = wanted.new_zeros((2, 2, max(sizes), n))
        errors, (true, scale) = torch.empty_like(values, dtype=p.dtype), torch.empty_like(values)
        memory = energy, values, *values, errors, *errors, true, scale
        views = {size: [each[..., :size, :] for each in memory] for size in set(sizes)}
        for panel, target in zip(self._panels, codes.split(sizes), strict=True):
            place, loudness, gains, directions, share = (each.to(device) for each in panel)
            own, both, fed, nearest, lost, lost_fed, lost_nearest, true, scale = views[len(place)]
            groups = place // (k // len(step))
            torch.index_select(wanted, 0, place, out=true)
            torch.index_select(inverse, 0, groups, out=scale)
            torch.mm(gains, _bounded(p[0].round(), len(p[0])), out=lost_fed)
            torch.sub(true, fed.copy_(lost_fed), out=fed).mul_(scale)
            torch.mul(true, scale, out=nearest)
            if isinstance(levels, Levels):
                target.copy_(levels.round_(both, groups)[0])
            else:
                target.copy_(round_codes_(both, levels)[0])
            torch.index_select(step, 0, groups, out=scale)
            both.mul_(scale).sub_(true).mul_(loudness).round_()
            lost.copy_(_bounded(both, k))
            p[0].addmm_(directions, lost_fed)
            p[1].addmm_(directions, lost_nearest)
            own.add_(both.mul_(share).square_())
        return codes, _fold(energy) + _fold(p.square_())


def _fold(terms: Tensor) -> Tensor:
    """Sum over dimension 1, in an order that no library chooses."""
    while (count := terms.shape[1]) > 1:
        half = count // 2
        terms[:, :half] += terms[:, count - half :]
        terms = terms[:, : count - half]
    return terms[:, 0]


def _bounded(values: Tensor, terms: int) -> Tensor:
    """Whole ``values``, clamped so that sums of so many products with ``_coarse`` ones are exact.

    They are far smaller, but where codes are clipped column after column: such a row loses.
    """
    most = 2.0 ** (53 - _FACTOR_BITS) / terms
    return values.clamp_(-most, most)


def _root(values: Tensor) -> Tensor:
    """Square roots of fp64, correctly rounded, which torch.sqrt's need not be."""
    return torch.from_numpy(np.sqrt(values.numpy()))


def _coarse(values: Tensor, peak: Tensor) -> Tensor:
    """``values``, of magnitude ``peak`` (powers of two) at most, in few bits of that."""
    finest = 2.0**-_FACTOR_BITS * peak
    return (values / finest).round() * finest


def _power_above(values: Tensor) -> Tensor:
    """The least power of two above each of ``values``, fp64; 1 above zero."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent)


def _panels(columns: int) -> list[slice]:
    """Columns that are rounded at once: the loudest ones alone, then more and more."""
    panels, start = [], 0
    while start < columns:
        width = max(1, int(min(start * _OF_EARLIER, columns * _OF_ALL)))
        panels.append(slice(start, min(start + width, columns)))
        start += width
    return panels


def _gains(rest: np.ndarray, directions: np.ndarray, panels: list[slice]) -> Tensor:
    """fp64 [K, r]: column j makes up for p by ``-gains[j] . p``, as its panel and later ones do.

    Columns from a panel on, were they not rounded, leave ``p^T S p`` of |p|^2, ``S = (I + sum over
    them of v v^T / rest)^-1``, by making up ``S v / rest . p`` each; S loses a rank-one part by
    every column (Sherman-Morrison).
    """
    left = np.eye(directions.shape[1])
    gains = np.empty_like(directions)
    for panel in reversed(panels):
        for own, v in zip(rest[panel], directions[panel], strict=True):
            reach = (left * v).sum(1)
            left -= reach[:, None] * (reach / (own + (v * reach).sum()))
        gains[panel] = (left * directions[panel, None]).sum(2) / rest[panel]
    return torch.from_numpy(gains)


def _check(square: Tensor, directions: Tensor) -> None:
    shapes = square.ndim, directions.ndim
    if shapes != (1, 2) or len(directions) != len(square) or not directions.shape[1]:
        raise OpError(
            "error feedback needs a mean square and some directions of each input",
            found=f"{list(square.shape)} and {list(directions.shape)}",
            needed="[K] and [K, r]",
        )
    if not (square.isfinite() & (square > 0)).all() or not directions.isfinite().all():
        raise OpError("error feedback", needed="finite numbers, mean squares above zero")
