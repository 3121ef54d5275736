"""Least error of a block in the numbers that are stored: d, dmin, scales and minima as rounded.

A search fits each group on its own, and rounding its scale and minimum to a few bits of d and dmin
spoils the fit. Here the error that a decoder will make is lowered, ``sum importance * (d * scale *
code - dmin * minimum - x)^2``: d and dmin are solved for (two unknowns, least squares). Where
inputs were measured (importance is their mean square, and the sum the output error that it
foretells) scales and minima move by whole steps first. Each step is kept only where the error
falls.

As in ``search``: columns of independent problems, +, -, *, / and rounding in float32, sums in a
fixed order, so that the bytes depend on nothing but the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import Codes, round_codes_
from .columns import bind_choice, ordered_sum

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

    codes: Codes
    scales: tuple[int, int] = (0, 0)
    minima: tuple[int, int] = (0, 0)
    moves: tuple[tuple[int, int], ...] = ()


def as_stored(values: Tensor) -> Tensor:
    """What a decoder reads back: rounded to float16."""
    return values.to(torch.float16).to(torch.float32)


def best_codes(x: Tensor, fit: StoredFit, codes: Codes, out: Tensor | None = None) -> Tensor:
    """(x + dmin * minimum) / (d * scale), rounded to codes: those of least error; x [g, G, n]."""
    step = fit.d * fit.scale
    inverse = torch.where(step != 0, step.reciprocal(), 0)
    if fit.dmin is None:
        out = torch.mul(x, inverse, out=out)
    else:
        out = torch.add(x, fit.dmin * fit.minimum, out=out).mul_(inverse)
    return round_codes_(out, codes)


def group_errors(x: Tensor, importance: Tensor | None, fit: StoredFit, codes: Tensor) -> Tensor:
    """sum importance * (d * scale * code - dmin * minimum - x)^2 over a group: [groups, n].

    Uses ``codes`` up.
    """
    residual = codes.mul_(fit.d * fit.scale)
    if fit.dmin is not None:
        residual.sub_(fit.dmin * fit.minimum)
    residual.sub_(x)
    residual.mul_(residual)
    return ordered_sum(residual if importance is None else residual.mul_(importance))


def refine(x: Tensor, importance: Tensor | None, fit: StoredFit, limits: Limits) -> StoredFit:
    """A fit of no more error than ``fit``; x, importance [weights of a group, groups, n]."""
    scratch = torch.empty_like(x)

    def least_errors(fit: StoredFit) -> Tensor:
        return group_errors(x, importance, fit, best_codes(x, fit, limits.codes, scratch))

    error = least_errors(fit)
    for _ in range(ROUNDS):
        if limits.moves:
            error, fit = _move(fit, error, limits, least_errors)
        codes = best_codes(x, fit, limits.codes, scratch)
        trial = _solve(fit, _products(x, importance, fit, codes))
        trial_error = least_errors(trial)
        better = ordered_sum(trial_error) < ordered_sum(error)
        error = torch.where(better, trial_error, error)
        fit = choose(better, trial, fit)
    return fit


def _move(
    fit: StoredFit, error: Tensor, limits: Limits, least_errors: Callable[[StoredFit], Tensor]
) -> tuple[Tensor, StoredFit]:
    """The best of ``limits.moves`` from ``fit`` for each group: its error and the fit."""
    centre = torch.stack(
        [error, fit.scale] if fit.minimum is None else [error, fit.scale, fit.minimum]
    )
    kept, trial = centre.clone(), torch.empty_like(centre)
    better = torch.empty_like(error)
    keep_better = bind_choice(better, trial, kept)
    fields = ("scale", "minimum")[: len(centre) - 1]
    for step, shift in limits.moves:
        torch.add(centre[1], step, out=trial[1]).clamp_(*limits.scales)
        if fit.minimum is not None:
            torch.add(centre[2], shift, out=trial[2]).clamp_(*limits.minima)
        trial[0] = least_errors(fit._replace(**dict(zip(fields, trial[1:], strict=True))))
        torch.lt(trial[0], kept[0], out=better)
        keep_better()
    return kept[0], fit._replace(**dict(zip(fields, kept[1:], strict=True)))


def choose(first: Tensor, one: StoredFit, other: StoredFit) -> StoredFit:
    """``one`` where ``first`` holds, else ``other``; what both share is not copied."""
    pairs = zip(one, other, strict=True)
    return StoredFit(*(a if a is b else torch.where(first, a, b) for a, b in pairs))


class _Products(NamedTuple):
    """Sums over a block of products of step (code * scale), shift (-minimum) and x; all [n]."""

    dd: Tensor
    dx: Tensor
    mm: Tensor
    dm: Tensor
    mx: Tensor


def settle(x: Tensor, importance: Tensor | None, fit: StoredFit, codes: Codes) -> StoredFit:
    """``fit`` with d and dmin solved for where that takes more off the error; see ``refine``."""
    products = _products(x, importance, fit, best_codes(x, fit, codes))
    trial = _solve(fit, products)
    return choose(_gain(trial, products) > _gain(fit, products), trial, fit)


def _gain(fit: StoredFit, products: _Products) -> Tensor:
    dd, dx, mm, dm, mx = products
    gain = fit.d * (2 * dx - fit.d * dd)
    if fit.dmin is None:
        return gain
    return gain + fit.dmin * (2 * (mx - fit.d * dm) - fit.dmin * mm)


def _products(x: Tensor, importance: Tensor | None, fit: StoredFit, codes: Tensor) -> _Products:
    """Uses ``codes`` up."""
    steps = codes.mul_(fit.scale)
    weighted = steps if importance is None else importance * steps
    dx = _block_sum(weighted * x)
    mm = dm = mx = torch.zeros_like(dx)
    if fit.minimum is not None:
        shifts = -fit.minimum
        sum_w = float(len(x)) if importance is None else ordered_sum(importance)
        sum_x = ordered_sum(x if importance is None else importance * x)
        mm = ordered_sum(shifts * shifts * sum_w)
        dm = ordered_sum(ordered_sum(weighted) * shifts)
        mx = ordered_sum(sum_x * shifts)
    return _Products(_block_sum(steps.mul_(weighted)), dx, mm, dm, mx)


def _solve(fit: StoredFit, products: _Products) -> StoredFit:
    """d and dmin of least error for given codes, scales and minima; NaN where there is none."""
    dd, dx, mm, dm, mx = products
    if fit.dmin is None:
        return fit._replace(d=as_stored(dx / dd))
    determinant = dd * mm - dm * dm
    both = determinant > 1e-6 * dd * mm  # else one follows from the other, or no minimum is used
    d = torch.where(both, (dx * mm - mx * dm) / determinant, dx / dd)
    dmin = torch.where(both, (dd * mx - dm * dx) / determinant, fit.dmin)
    d = torch.where(both | (mm == 0), d, fit.d)
    return fit._replace(d=as_stored(d), dmin=as_stored(dmin))


def _block_sum(terms: Tensor) -> Tensor:
    """[g, G, n] -> [n], in a fixed order."""
    return ordered_sum(ordered_sum(terms))
