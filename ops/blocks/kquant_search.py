"""How K-quants are encoded: a scale of least error for each group, then whole steps of ``d``.

A block of 256 weights is cut into groups; the format says how its codes and scales are packed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..codes import Codebook
from ..native import encode as native
from . import ggml, search
from .base import divide, half_above, signed_peak, to_half
from .coded import CodedFormat
from .columns import every_row, ordered_sum
from .refine import Limits, StoredFit, best_codes, group_errors, refine, settle

Fitted = tuple[StoredFit, Tensor, Tensor | None, Tensor | None]
"""A fit and its codes int8 [n, groups, group]; what it lost and which blocks ggml is
to be asked for, both [n], where it is."""


class KQuant(CodedFormat):
    """A block of ``256 // group`` groups; see ``AffineK`` and ``SymmetricK``."""

    block_size = 256

    group: ClassVar[int]  # weights that share a scale
    # The error's share of a gaussian block's energy; 0 where ggml's encoder is not at hand.
    gaussian_loss: ClassVar[float] = 0.0

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        fit, codes, lost, lucky = self._fit_natively(weights, importance) or self.fit_in_torch(
            weights, importance
        )
        blocks = self._pack(fit, codes)
        if lucky is not None:
            self._take_luckier(weights, blocks, lost, lucky)
        return blocks

    def fit_in_torch(self, weights: Tensor, importance: Tensor | None) -> Fitted:
        """What ``encode`` packs, for the same arguments."""
        x = columns_of(weights, self.group)  # [group, groups, n]
        plain = importance is None
        fit = self._fit(x, None if plain else every_row(columns_of(importance, self.group), x))
        codes = best_codes(x, fit, self.code_limits)
        rows = rows_of(codes.to(torch.int8))
        if not plain or not self.gaussian_loss:
            return fit, rows, None, None
        lost = ordered_sum(group_errors(x, None, fit, codes))
        return fit, rows, lost, ggml.worth_trying(x, lost / self.gaussian_loss)

    def _fit_natively(self, weights: Tensor, importance: Tensor | None) -> Fitted | None:
        """The same, compiled; None where that is not at hand, and for codes from a table."""
        encoder = native.encoder_for(weights)
        if encoder is None or isinstance(self.code_limits, Codebook):
            return None
        found = encoder.fit_blocks(weights, importance, self.search_of(importance is None))
        codes, d, scale, dmin, minimum, lost, lucky = found
        if not bool(d.isfinite().all() and dmin.isfinite().all()):
            return None  # refused in torch, with the number of such blocks
        fit = (
            StoredFit(d, scale, dmin, minimum) if isinstance(self, AffineK) else StoredFit(d, scale)
        )
        asked = importance is None and self.gaussian_loss
        return fit, codes, *((lost, lucky) if asked else (None, None))

    @abstractmethod
    def search_of(self, plain: bool) -> native.Search:
        """What ``_fit`` tries, without importance and with."""

    def _take_luckier(self, weights: Tensor, blocks: Tensor, lost: Tensor, where: Tensor) -> None:
        """Of the ``blocks`` ``where`` bool [n] says, take ggml's where less than ``lost`` is."""
        if not where.any():
            return
        rows, ours = weights[where], blocks[where]
        theirs = self.encode_as_ggml(rows)
        values = torch.empty_like(rows)
        self.decode(theirs, values)
        errors = values.sub_(rows).square_()
        nearer = ordered_sum(errors.t().contiguous()) < lost[where]
        blocks[where] = torch.where(nearer[:, None], theirs, ours)

    @abstractmethod
    def _fit(self, x: Tensor, importance: Tensor | None) -> StoredFit:
        """Of least squared errors, weighed by ``importance``; both [group, groups, n]."""

    @abstractmethod
    def _pack(self, fit: StoredFit, codes: Tensor) -> Tensor:
        """Blocks of a fit and of ``codes`` int8 [n, groups, group]."""


class AffineK(KQuant):
    """``d * sc * q - dmin * m``: scales and minima from 0 to ``scale_top``.

    ``widths``, ``plain_widths``: steps over a group, beside the highest code, that the search tries
    with importance and without. ``moves``, ``plain_moves``: steps of (scale, minimum) it then
    tries; none: d and dmin alone are settled.
    """

    scale_top: ClassVar[int]
    widths: ClassVar[tuple[float, ...]]
    plain_widths: ClassVar[tuple[float, ...]]
    moves: ClassVar[tuple[tuple[int, int], ...]]
    plain_moves: ClassVar[tuple[tuple[int, int], ...]] = ()

    def _fit(self, x: Tensor, importance: Tensor | None) -> StoredFit:
        top, most = self.code_limits[1], self.scale_top
        widths = self.plain_widths if importance is None else self.widths
        scale, offset = search.fit_affine(x, importance, top, tuple(top + each for each in widths))
        d, dmin = (to_half(steps_to_top(each, most)[0]).float() for each in (scale, offset))
        fit = StoredFit(d, in_steps(scale, d, 0, most), dmin, in_steps(offset, dmin, 0, most))
        moves = self.plain_moves if importance is None else self.moves
        if not moves:
            return settle(x, importance, fit, self.code_limits)
        return refine(x, importance, fit, Limits(self.code_limits, (0, most), (0, most), moves))

    def search_of(self, plain: bool) -> native.Search:
        top = self.code_limits[1]
        return native.search(
            self.group,
            self.code_limits,
            (0, self.scale_top),
            tuple(top + each for each in (self.plain_widths if plain else self.widths)),
            self.plain_moves if plain else self.moves,
            affine=True,
            gaussian_loss=self.gaussian_loss,
        )


class SymmetricK(KQuant):
    """``d * sc * q``: signed scales within ``scale_limits``, the largest one at the lower end.

    ``widths``, ``plain_widths``: codes that the search puts a group's peak at, below zero (above
    for negative ones), with importance and without; ``moves``, ``plain_moves``: steps of the scale
    it then tries, none: d alone is settled.
    """

    scale_limits: ClassVar[tuple[int, int]]
    widths: ClassVar[tuple[float, ...]]
    plain_widths: ClassVar[tuple[float, ...]]
    moves: ClassVar[tuple[int, ...]] = ()
    plain_moves: ClassVar[tuple[int, ...]] = ()

    def _fit(self, x: Tensor, importance: Tensor | None) -> StoredFit:
        widths = self.plain_widths if importance is None else self.widths
        scale = search.fit_symmetric(x, importance, self.code_limits, widths)
        d = half_above(steps_to_peak(scale, self.scale_limits[0])[0]).float()
        fit = StoredFit(d, in_steps(scale, d, *self.scale_limits))
        moves = self.plain_moves if importance is None else self.moves
        if not moves:
            return settle(x, importance, fit, self.code_limits)
        steps = tuple((step, 0) for step in moves)
        return refine(x, importance, fit, Limits(self.code_limits, self.scale_limits, moves=steps))

    def search_of(self, plain: bool) -> native.Search:
        return native.search(
            self.group,
            self.code_limits,
            self.scale_limits,
            self.plain_widths if plain else self.widths,
            tuple((step, 0) for step in (self.plain_moves if plain else self.moves)),
            affine=False,
            gaussian_loss=self.gaussian_loss,
        )


def columns_of(blocks: Tensor, group: int) -> Tensor:
    """[n, 256] -> [group, 256 // group, n] contiguous; two plain copies beat one permutation."""
    by_weight = blocks.t().contiguous().view(256 // group, group, len(blocks))
    return by_weight.transpose(0, 1).contiguous()


def rows_of(codes: Tensor) -> Tensor:
    """[group, groups, n] -> [n, groups, group] contiguous: the inverse of ``columns_of``."""
    group, groups, n = codes.shape
    by_weight = codes.transpose(0, 1).reshape(groups * group, n)
    return by_weight.t().contiguous().view(n, groups, group)


def in_steps(values: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    """round(values / step), clamped; zero where the stored step [n] is zero."""
    return torch.where(step != 0, divide(values, step), 0).round_().clamp_(least, most)


def steps_to_top(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """values [groups, n] >= 0 -> step [n] = max / top, and round(values / step) in float32."""
    high = values.amax(0)
    positive = high > 0
    inverse = torch.where(positive, divide(float(top), high), 0)
    codes = (values * inverse).round_().clamp_(max=top)
    return divide(torch.where(positive, high, 0), float(top)), codes


def steps_to_peak(values: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [groups, n] -> step [n] = peak / least, round(values / step), [n] all but zero."""
    peak = signed_peak(values, 0)
    inverse = divide(float(least), peak)
    empty = peak.abs() < ggml.NEGLIGIBLE
    codes = (values * inverse).round_().clamp_(max=-least - 1).masked_fill_(empty, 0)
    return inverse.reciprocal().masked_fill_(empty, 0), codes, empty
