"""Rounding with error feedback from all of the inputs' second moments (GPTQ, LDLQ).

A linear's output error is ``e^T C e`` for the error e of a row of its weight and C = E[x x^T] of
its inputs. With ``C = M M^T``, M upper triangular, it is the sum over columns k of
``(M_kk)^2 (e_k + sum_{i<k} e_i M_ik / M_kk)^2``: so column after column is rounded to what the
errors of the earlier ones leave to be made up for. Source: GPTQ, arXiv 2210.17323, in the form of
QuIP, arXiv 2307.13304, section 3.

C has K^2 values and M too: 1.2 GB for the widest linears here. ``ops.feedback`` does the same for a
C of a few directions in K * r values.

Everything is fp64: the order of a product's sums, which differs with threads and machines, changes
the last of 53 bits of a target, and a code only where the target lies that near a middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import OpError
from .codes import Codes, Levels, round_codes_
from .wide import has_float64

_PANEL = 64  # columns between two products of matrices
# Of the mean diagonal, added to it: without it a C of fewer inputs than columns has no root.
_RIDGE = 1e-4
_MORE_RIDGE = 10.0
_MOST_RIDGE = 1.0
# Share of the expected error that a row has to keep to be the better one: beyond any rounding.
_LESS = 0.999


class MomentsError(OpError):
    """Second moments that no inputs have."""


Refit = Callable[[int, Tensor], Tensor]
"""``refit(group, target [N, width]) -> step [N]``: the step of a group of columns for what is to be
rounded, once earlier columns' errors are made up for. Of levels on a grid it is in units of it."""


class ExactFeedback:
    """Codes of least ``e^T C e``, column after column, loudest inputs first.

    ``moments`` C: floating point [K, K], symmetric, the mean products of the inputs. ``run``: so
    many neighbouring columns follow each other, whatever their loudness: a group whose step is to
    be refitted; a divisor of 64 and of K. Raises OpError for another shape, values that are not
    finite, and a diagonal that is not above zero; MomentsError for moments that no inputs have.
    """

    def __init__(self, moments: Tensor, run: int = 1) -> None:
        _check(moments)
        if _PANEL % run or len(moments) % run:
            raise OpError("columns are no whole runs", found=run, needed=f"a divisor of {_PANEL}")
        self.run = run
        place = torch.device("cpu") if not has_float64(moments.device) else moments.device
        c = moments.to(place, torch.float64)
        square = c.diagonal().clone()
        self.rest = square.float().cpu()
        order = _loudest_first(square, run)
        self.order: list[int] = order.tolist()
        root = _upper_root(c[order].index_select(1, order))
        own = root.diagonal().clone()
        self._energy = own.square()
        # feedback[k, i] = M_ik / M_kk for i < k: rows are columns of the weight
        self._feedback = root.div_(own).triu_(1).t().contiguous()

    def round(
        self,
        weight: Tensor,
        step: Tensor,
        shift: Tensor | None,
        levels: Codes | Levels,
        refit: Refit | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] of ``weight``, and whether less error is expected of them than of the
        nearest codes, bool [N].

        Arguments and promises are those of ``Feedback.round``. ``refit`` gives each group another
        step as soon as it is its turn; the nearest codes are those of ``step``. It needs groups of
        ``run`` columns.
        """
        place = self._feedback.device
        wanted = weight.to(place).t().double()
        steps, shifts = (None if each is None else each.to(place).t() for each in (step, shift))
        if isinstance(levels, Levels):
            levels = levels.on(place)
            if refit is not None and levels.grid is not None:
                levels = replace(levels, grid=levels.grid.clone())
        grid = _Grid(steps, shifts, levels, weight.shape[1] // step.shape[1])
        lost_by_nearest = self._lost(wanted, grid)
        codes, lost = self._follow(wanted, grid, refit)
        better = lost < _LESS * lost_by_nearest
        return codes.t().contiguous().to(weight.device), better.to(weight.device)

    def _follow(self, wanted: Tensor, grid: _Grid, refit: Refit | None) -> tuple[Tensor, Tensor]:
        """Codes int8 [K, N] and the error expected of them, fp64 [N]. wanted: fp64 [K, N]."""
        order = torch.tensor(self.order, device=wanted.device)
        codes = torch.empty(wanted.shape, dtype=torch.int8, device=wanted.device)
        errors = torch.empty_like(wanted)  # of columns in the order of rounding
        lost = wanted.new_zeros(wanted.shape[1])
        for start, stop in self._panels():
            true = wanted[order[start:stop]]
            target = torch.addmm(true, self._feedback[start:stop, :start], errors[:start])
            for first in range(start, stop, self.run):
                last = first + self.run
                turn = target[first - start : last - start]
                turn.addmm_(self._feedback[first:last, start:first], errors[start:first])
                if refit is not None:
                    grid.refit(refit, self.order[first:last], turn)
                for column in range(first, last):
                    place = order[column : column + 1]
                    now = turn[column - first : column - first + 1]
                    code, value = grid.nearest(now, place)
                    codes[self.order[column]] = code[0]
                    lost.add_((now - value).square_()[0], alpha=self._energy[column].item())
                    error = torch.sub(true[column - start], value[0], out=errors[column])
                    if column + 1 < last:
                        later = self._feedback[column + 1 : last, column]
                        turn[column + 1 - first :].add_(later[:, None] * error)
        return codes, lost

    def _lost(self, wanted: Tensor, grid: _Grid) -> Tensor:
        """The error expected of the nearest codes, fp64 [N]."""
        order = torch.tensor(self.order, device=wanted.device)
        errors = torch.empty_like(wanted)
        lost = wanted.new_zeros(wanted.shape[1])
        for start, stop in self._panels():
            true = wanted[order[start:stop]]
            own = torch.sub(true, grid.nearest(true, order[start:stop])[1], out=errors[start:stop])
            made_up_for = torch.addmm(own, self._feedback[start:stop, :stop], errors[:stop])
            lost += made_up_for.square_().mul_(self._energy[start:stop, None]).sum(0)
        return lost

    def _panels(self) -> Iterator[tuple[int, int]]:
        """(first column, the one after the last), in the order of rounding."""
        k = len(self.order)
        return ((start, min(start + _PANEL, k)) for start in range(0, k, _PANEL))


class _Grid:
    """What a weight's codes stand for: steps and shifts [G, N] of runs of ``width`` columns."""

    def __init__(
        self, step: Tensor, shift: Tensor | None, levels: Codes | Levels, width: int
    ) -> None:
        self.step, self.shift = step.double(), None if shift is None else shift.double()
        inverse = self.step.reciprocal()
        self.inverse = inverse.masked_fill_(inverse.isinf(), 0)  # such steps decode to -shift
        self.levels, self.width = levels, width

    def refit(self, refit: Refit, columns: list[int], target: Tensor) -> None:
        """Another step for the group of ``columns``, whose targets are the first rows of
        ``target`` fp64 [>= width, N], in the order of ``columns``."""
        group = columns[0] // self.width
        in_order = torch.tensor(columns, device=target.device).argsort()
        step = refit(group, target[in_order].t().float().contiguous()).double()
        if isinstance(self.levels, Levels) and self.levels.grid is not None:
            self.step[group] *= step / self.levels.grid[group]
            self.levels.grid[group] = step
        else:
            self.step[group] = step
        inverse = self.step[group].reciprocal()
        self.inverse[group] = inverse.masked_fill_(inverse.isinf(), 0)

    def nearest(self, values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8, what a reader takes them for) of ``values`` fp64 [B, N] in B columns."""
        groups = columns // self.width
        shift = None if self.shift is None else self.shift.index_select(0, groups)
        shifted = values if shift is None else values + shift
        level = (shifted * self.inverse.index_select(0, groups)).float()
        if isinstance(self.levels, Levels):
            code = self.levels.round_(level, groups)
        else:
            code = round_codes_(level, self.levels)
        value = self.step.index_select(0, groups).mul_(level)
        return code.to(torch.int8), value if shift is None else value.sub_(shift)


def _loudest_first(square: Tensor, run: int) -> Tensor:
    """The order of columns by their mean squares, runs of ``run`` together by their sums."""
    runs = square.view(-1, run)
    inside = runs.argsort(dim=1, descending=True, stable=True)
    order = runs.sum(1).argsort(descending=True, stable=True)
    return (inside + run * torch.arange(len(runs), device=square.device)[:, None])[order].flatten()


def _upper_root(c: Tensor) -> Tensor:
    """M upper triangular with ``M M^T = C``, C fp64 with as much added to its diagonal as it takes.

    Raises MomentsError if even its mean does not make it positive.
    """
    mean, ridge = c.diagonal().mean(), _RIDGE
    flipped = c.flip(0, 1)
    square = flipped.diagonal().clone()
    while ridge <= _MOST_RIDGE:
        flipped.diagonal().copy_(square + ridge * mean)
        lower, info = torch.linalg.cholesky_ex(flipped)
        if int(info) == 0:
            return lower.flip(0, 1)
        ridge *= _MORE_RIDGE
    raise MomentsError(
        "no inputs have such second moments", found="a negative energy", needed=">= 0"
    )


def _check(moments: Tensor) -> None:
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or not len(moments):
        raise OpError(
            "error feedback needs the second moments of the inputs",
            found=list(moments.shape),
            needed="[K, K]",
        )
    if not bool(moments.isfinite().all()) or not bool((moments.diagonal() > 0).all()):
        raise OpError("error feedback", needed="finite moments, mean squares above zero")
