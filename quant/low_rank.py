"""The part of a matrix that a few columns hold: the best low-rank update for given inputs.

``||(D - up down) x||`` is least, in the mean over inputs x with ``E[x x^T] = L L^T``, for
``up = U``, ``down = U^T D`` with U the first left singular vectors of ``M = D L``: what is left is
the energy of M's other singular values. No inverse of L is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.wide import wide, wide_sum
from .input_moments import InputMoments, signs

# Below this many rows or columns M is decomposed exactly; above by its image of random vectors.
_EXACT = 1024
# Vectors beyond the rank asked for, and rounds of M M^T: sketches of slowly falling spectra are
# within a percent of the best (Halko, Martinsson, Tropp 2011, section 10).
_MORE = 16
_ROUNDS = 4


@dataclass(frozen=True)
class Truncated:
    """The best update of a rank, and what each smaller rank would leave.

    down [r, K], up [N, r], fp32, of equal norms column by row. energies: fp64 [r], what each rank
    takes away of ``total``, the mean square of ``D x`` summed over outputs.
    """

    down: Tensor
    up: Tensor
    energies: Tensor
    total: float

    def left(self, rank: int) -> float:
        """The mean square of ``(D - up down) x`` at a rank up to that of this update."""
        return max(self.total - self.energies[:rank].sum().item(), 0.0)


class _Weighed:
    """M = D L of inputs ``E[x x^T] = diag(rest) + V V^T``, never stored: L = [diag(rest)^.5, V]."""

    def __init__(self, matrix: Tensor, inputs: InputMoments | None):
        n, k = matrix.shape
        own = matrix.new_ones(k) if inputs is None else inputs.rest.to(matrix).sqrt()
        directions = matrix.new_zeros(k, 0) if inputs is None else inputs.directions.to(matrix)
        self.matrix, self.own, self.directions = matrix, own[:, None], directions
        self.shape = (n, k + directions.shape[1])

    def times(self, vectors: Tensor) -> Tensor:
        """M v: [K + r, c] -> [N, c]."""
        k = len(self.own)
        return self.matrix @ (self.own * vectors[:k] + self.directions @ vectors[k:])

    def transposed_times(self, vectors: Tensor) -> Tensor:
        """M^T u: [N, c] -> [K + r, c]."""
        return self._weigh(self.matrix.t() @ vectors)

    def transposed(self) -> Tensor:
        """M^T itself, [K + r, N]."""
        return self._weigh(self.matrix.t())

    def _weigh(self, columns: Tensor) -> Tensor:
        return torch.cat([self.own * columns, self.directions.t() @ columns])


def truncate(matrix: Tensor, rank: int, inputs: InputMoments | None = None) -> Truncated:
    """The best update of ``rank`` for D ``matrix`` fp32 [N, K]; rank is cut to min(N, K).

    inputs: of the linear; None takes all inputs as equally loud and unrelated. The same matrix
    gives the same update: the random vectors are always the same.
    """
    weighed = _Weighed(matrix, inputs)
    rank = min(rank, *matrix.shape)
    left, energies = _leading(weighed, rank)
    down = left.t() @ matrix
    sizes = down.norm(dim=1).sqrt()
    scale = torch.where(sizes > 0, sizes, 1.0)
    total = wide_sum(matrix.square()).item() if inputs is None else inputs.output_energy(matrix)
    return Truncated(down / scale[:, None], left * scale, energies.cpu(), total)


def _leading(weighed: _Weighed, rank: int) -> tuple[Tensor, Tensor]:
    """(left singular vectors [N, rank] with a fixed sign, squared singular values fp64)."""
    n, columns = weighed.shape
    width = rank + _MORE
    if min(n, columns) <= max(_EXACT, width):
        found, energies = _small_svd(weighed.transposed(), rank)
    else:
        start = signs(columns, width).to(weighed.matrix)
        base = torch.linalg.qr(weighed.times(start)).Q
        for _ in range(_ROUNDS):
            back = torch.linalg.qr(weighed.transposed_times(base)).Q
            base = torch.linalg.qr(weighed.times(back)).Q
        left, energies = _small_svd(weighed.transposed_times(base), rank)
        found = base @ left
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found * torch.where(largest < 0, -1.0, 1.0), energies


def _small_svd(transposed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of a matrix given transposed [columns, width]: its left vectors, its squared values."""
    _, values, right = torch.linalg.svd(wide(transposed), full_matrices=False)
    return right[:rank].t().to(transposed), values[:rank].square()
