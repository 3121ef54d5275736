"""Which inputs of a linear are loud, and which are loud together: E[x x^T] in little memory.

The matrix has K^2 values, 600 MB for w2. A calibration keeps its diagonal and its product with a
few columns of random signs (the sketch), sums both, so that runs can be added. Nystrom's formula
makes of them the directions in which most of the inputs' energy lies: what it gives is never more
than the true matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..ops.feedback import Feedback, output_energy
from ..ops.rotation import rotate
from ..ops.wide import wide, wide_sum

DIRECTIONS = 16
"""Columns of a sketch: twice as many gain up to 1.7 dB more at Q4_K on the pocket model
(``bench_importance.py``), for twice the file and twice the time of rounding."""

# Energy of a direction, as a share of the strongest, below which it is rounding of the sums.
_NOISE = 1e-6
# Mean square of an input that calibration never saw, of their mean: another prompt may bring it.
_UNSEEN = 1e-6
# Mean square below which inputs count as zero: of the quietest ones fp32 could not hold it.
_SILENCE = 1e-20
# Share of an input's mean square that directions explain, beyond which the sums are wrong: in exact
# sums it is 1 at most.
_IMPOSSIBLE = 1.01
# Power of what calibration did not see, of the typical input's: feedback would else pile errors on
# inputs that were silent (channels of w2 that only some words wake), for hardly any gain: pictures
# of the pocket model at Q4_K lose 3 dB of latent SQNR without it.
_DAMPING = 0.3


@dataclass(frozen=True, eq=False)
class InputMoments:
    """``E[x x^T] ~ diag(rest) + directions @ directions.T``, with ``square`` on its diagonal.

    square: fp32 [K], the mean square of each input, above zero; directions: fp32 [K, r].
    """

    square: Tensor
    directions: Tensor

    @property
    def rest(self) -> Tensor:
        """What no direction explains of ``square``: fp32 [K]."""
        return (self.square - self.directions.square().sum(1)).clamp_min(0)

    def output_energy(self, rows: Tensor) -> float:
        """Mean square of the outputs of a weight's ``rows`` [N, K], or of their error: the sum."""
        return wide_sum(output_energy(rows, self.rest, self.directions)).item()

    def scaled(self, factors: Tensor) -> InputMoments:
        """Of the inputs ``x * factors`` [K], none of them zero."""
        factors = factors.to(self.square)
        return InputMoments(self.square * factors.square(), self.directions * factors[:, None])

    def rotated(self, group: int) -> InputMoments:
        """Of the inputs ``rotate(x, group)``; what no direction explains spreads evenly."""
        directions = rotate(self.directions.t().contiguous(), group).t().contiguous()
        spread = self.rest.view(-1, group).mean(1).repeat_interleave(group)
        return InputMoments(spread + directions.square().sum(1), directions)

    def damped(self) -> InputMoments:
        """With noise added, of equal power on all inputs; the typical one is ``(mean rms)^2``."""
        typical = self.square.sqrt().mean().square()
        return InputMoments(self.square + _DAMPING * typical, self.directions)

    def feedback(self) -> Feedback | None:
        """How to round weights of these inputs; None without directions."""
        return Feedback(self.square, self.directions) if self.directions.shape[1] else None


def sketch(x: Tensor, columns: int = DIRECTIONS) -> Tensor:
    """``sum over rows of x (x . signs)``: fp32 [T, K] -> fp32 [K, columns]."""
    return x.t() @ (x @ signs(x.shape[1], columns).to(x.device))


@lru_cache(maxsize=16)
def signs(features: int, columns: int) -> Tensor:
    """fp32 [features, columns] of 1 and -1, the same ones everywhere and always."""
    draws = np.random.Philox(key=0).random_raw(features * columns)
    return torch.from_numpy(np.where(draws >> np.uint64(63), -1.0, 1.0)).float().view(-1, columns)


def input_moments(square_sum: Tensor, sums: Tensor, tokens: int) -> InputMoments | None:
    """Of sums over ``tokens`` inputs: squares fp64 [K], sketch fp32 [K, r]; None for silence.

    Where sums contradict each other, so that directions explain more than all of an input, they are
    shortened to that.
    """
    square = wide(square_sum) / tokens
    mean = square.mean()
    if not bool(mean > _SILENCE):
        return None
    square = square.clamp_min(_UNSEEN * mean.item())
    directions = _directions(wide(sums) / tokens)
    explained = directions.square().sum(1) / square
    excess = torch.where(explained > _IMPOSSIBLE, explained, 1.0)
    return InputMoments(square.float(), (directions / excess.sqrt()[:, None]).float())


def _directions(product: Tensor) -> Tensor:
    """V fp64 [K, r] with ``V V^T = Y (S^T Y)^+ Y^T``, for ``Y = C S`` of signs S."""
    core = signs(*product.shape).double().t() @ product
    energies, axes = torch.linalg.eigh((core + core.t()) / 2)
    kept = energies > _NOISE * energies[-1:].clamp_min(0)
    return product @ axes[:, kept] / energies[kept].sqrt()
