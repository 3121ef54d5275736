"""Least output error of a block in the numbers that are stored: the search that importance adds.

ggml's searches weigh each weight by a guess (``sqrt(2 mean(x^2) + x^2)``), round the group scales
once and fix d and dmin before that rounding. With the inputs' mean square h at hand the expected
output error itself, ``sum h * (d * scale * code - dmin * minimum - x)^2``, can be lowered on the
values that a decoder will read: scales and minima move by whole steps, then d and dmin are solved
for (two unknowns, least squares). Each step is kept only where that error falls.

As in ``search``: columns of independent problems, +, -, *, / and rounding in float32, sums in a
fixed order, so that the bytes depend on nothing but the arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .search import ordered_sum

ROUNDS = 2  # a third one gains less than 0.05 dB


class StoredFit(NamedTuple):
    """``x ~ d * scale * code - dmin * minimum`` as stored: d, dmin [n]; the others [groups, n].

    Formats without a minimum have neither dmin nor minimum.
    """

    d: Tensor
    scale: Tensor
    dmin: Tensor | None = None
    minimum: Tensor | None = None


class Limits(NamedTuple):
    """Ranges of codes, scales and minima, and the steps of (scale, minimum) that a round tries.

    Without moves scales and minima stay as they are.
    """

    codes: tuple[int, int]
    scales: tuple[int, int] = (0, 0)
    minima: tuple[int, int] = (0, 0)
    moves: tuple[tuple[int, int], ...] = ()


def as_stored(values: Tensor) -> Tensor:
    """What a decoder reads back: rounded to float16."""
    return values.to(torch.float16).to(torch.float32)


def best_codes(x: Tensor, fit: StoredFit, codes: tuple[int, int]) -> Tensor:
    """round((x + dmin * minimum) / (d * scale)), clamped: the codes of least error; x [g, G, n]."""
    step = fit.d * fit.scale
    inverse = torch.where(step != 0, step.reciprocal(), 0)
    shifted = x if fit.dmin is None else x + fit.dmin * fit.minimum
    return (shifted * inverse).round_().clamp_(*codes)


def group_errors(x: Tensor, importance: Tensor, fit: StoredFit, codes: Tensor) -> Tensor:
    """sum importance * (d * scale * code - dmin * minimum - x)^2 over a group: [groups, n]."""
    residual = codes * (fit.d * fit.scale)
    if fit.dmin is not None:
        residual.sub_(fit.dmin * fit.minimum)
    residual.sub_(x)
    return ordered_sum(residual.mul_(residual).mul_(importance))


def refine(x: Tensor, importance: Tensor, fit: StoredFit, limits: Limits) -> StoredFit:
    """A fit of no more error than ``fit``; x, importance [weights of a group, groups, n]."""
    error = group_errors(x, importance, fit, best_codes(x, fit, limits.codes))
    for _ in range(ROUNDS):
        centre = fit
        for step, shift in limits.moves:
            trial = fit._replace(scale=(centre.scale + step).clamp_(*limits.scales))
            if centre.minimum is not None:
                trial = trial._replace(minimum=(centre.minimum + shift).clamp_(*limits.minima))
            trial_error = group_errors(x, importance, trial, best_codes(x, trial, limits.codes))
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            fit = choose(better, trial, fit)
        trial = _solve(x, importance, fit, best_codes(x, fit, limits.codes))
        trial_error = group_errors(x, importance, trial, best_codes(x, trial, limits.codes))
        better = ordered_sum(trial_error) < ordered_sum(error)
        error = torch.where(better, trial_error, error)
        fit = choose(better, trial, fit)
    return fit


def choose(first: Tensor, one: StoredFit, other: StoredFit) -> StoredFit:
    """``one`` where ``first`` holds, else ``other``; what both share is not copied."""
    pairs = zip(one, other, strict=True)
    return StoredFit(*(a if a is b else torch.where(first, a, b) for a, b in pairs))


def _solve(x: Tensor, importance: Tensor, fit: StoredFit, codes: Tensor) -> StoredFit:
    """d and dmin of least error for given codes, scales and minima; NaN where there is none."""
    steps = codes * fit.scale
    weighted = importance * steps
    dd = _block_sum(weighted * steps)
    dx = _block_sum(weighted * x)
    if fit.dmin is None:
        return fit._replace(d=as_stored(dx / dd))
    shifts = -fit.minimum
    mm = ordered_sum(ordered_sum(importance) * shifts * shifts)
    dm = ordered_sum(ordered_sum(weighted) * shifts)
    mx = ordered_sum(ordered_sum(importance * x) * shifts)
    determinant = dd * mm - dm * dm
    both = determinant > 1e-6 * dd * mm  # else one follows from the other, or no minimum is used
    d = torch.where(both, (dx * mm - mx * dm) / determinant, dx / dd)
    dmin = torch.where(both, (dd * mx - dm * dx) / determinant, fit.dmin)
    d = torch.where(both | (mm == 0), d, fit.d)
    return fit._replace(d=as_stored(d), dmin=as_stored(dmin))


def _block_sum(terms: Tensor) -> Tensor:
    """[g, G, n] -> [n], in a fixed order."""
    return ordered_sum(ordered_sum(terms))
