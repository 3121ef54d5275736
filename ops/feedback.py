"""Rounding with error feedback: the errors of correlated inputs are made to cancel.

A linear's output error is ``e^T C e`` for the error e of a row of its weight and C = E[x x^T] of
its inputs. Rounding each weight on its own looks at the diagonal of C alone. GPTQ (arXiv
2210.17323) rounds column after column and lets the later ones make up for what the earlier ones
lost; its C has K^2 values, 600 MB for the widest linears here. With ``C ~ diag(rest) + V V^T`` of a
few directions V, K * r values, the same is exact at r products a weight: all that later columns
need to know of the earlier ones is ``p = V^T e``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .errors import OpError

# Directions explain at most this much of a column: other prompts bring other inputs.
MOST_SHARED = 0.95

# Of two sums in fp32 over any row here: they differ by less from their true values.
_UNSURE = 1e-3


def output_energy(rows: Tensor, rest: Tensor, directions: Tensor) -> Tensor:
    """``r^T (diag(rest) + V V^T) r`` of each row of ``rows`` [N, K]: fp32 [N], fp64 of fp64 rows.

    Of a weight: the mean square of its outputs; of a weight's error: that of the outputs' error.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    own = rows.square() @ rest.to(rows)
    return own + (rows @ directions.to(rows)).square().sum(1)


class Feedback:
    """Codes of least ``sum rest * e^2 + |V^T e|^2``, column after column, loudest inputs first.

    square: [K], the mean square of each input, above zero; directions: V [K, r], so that
    ``E[x x^T] ~ diag(rest) + V V^T`` has that diagonal. Raises OpError for other shapes or values.
    """

    def __init__(self, square: Tensor, directions: Tensor) -> None:
        _check(square, directions)
        square, shared = square.cpu().double(), directions.cpu().double()
        rest = square - shared.square().sum(1)
        rest = torch.maximum(rest, square * (1 - MOST_SHARED))
        self.order: list[int] = square.argsort(descending=True, stable=True).tolist()
        self.rest = rest.float()
        self.directions = shared.float()
        self._gains = _gains(rest.numpy(), shared.numpy(), self.order)

    def better(self, weight: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Whether less error is expected of ``after`` than of ``before``: bool [N].

        A row whose codes are clipped, by a scale that clips columns of little importance, may lose.
        fp32 sums depend on the number of threads; where their last digits would decide, fp64 does.
        """

        def energies(rows: slice | Tensor, dtype: torch.dtype) -> list[Tensor]:
            errors = (values[rows] - weight[rows] for values in (before, after))
            return [output_energy(e.to(dtype), self.rest, self.directions) for e in errors]

        lost, loses = energies(slice(None), torch.float32)
        better = loses < lost
        close = (loses - lost).abs() <= _UNSURE * lost
        if close.any():
            lost, loses = energies(close, torch.float64)
            better[close] = loses < lost
        return better

    def round(
        self, weight: Tensor, step: Tensor, shift: Tensor | None, limits: tuple[int, int]
    ) -> Tensor:
        """Codes int8 [N, K] of ``weight``, where a reader takes them for ``step * code - shift``.

        weight: fp32 [N, K]; step, shift: fp32 [N, G], one value a run of K // G columns; codes stay
        within ``limits``. The result depends on nothing but the arguments, not on threads.
        """
        if len(weight) == 1:  # numpy sums a single row in another order
            weight, step = weight.repeat(2, 1), step.repeat(2, 1)
            shift = None if shift is None else shift.repeat(2, 1)
            return self.round(weight, step, shift, limits)[:1]
        run = weight.shape[1] // step.shape[1]
        inverse = step.reciprocal()
        inverse.masked_fill_(inverse.isinf(), 0)  # such steps decode to -shift whatever the code
        wanted = weight.t().clone(memory_format=torch.contiguous_format)
        if shift is not None:
            wanted.unflatten(0, (-1, run)).add_(shift.t()[:, None])
        codes = torch.empty(wanted.shape, dtype=torch.int8, device=weight.device)
        columns = wanted, step.t().contiguous(), inverse.t().contiguous(), codes
        if _in_numpy(weight.device):
            columns = tuple(each.numpy() for each in columns)
        with np.errstate(all="ignore"):  # as torch: what overflows is not better, and is not kept
            self._follow(*columns, run, limits, *self._state(len(weight), weight.device))
        return codes.t().contiguous()

    def _follow(self, wanted, step, inverse, codes, run, limits, project, absorb) -> None:
        """Fill ``codes`` [K, N], column after column; the others [K, N] and [G, N], all arrays of
        numpy or all tensors."""
        for column in self.order:
            group = column // run
            value = wanted[column] - project(column)
            value *= inverse[group]
            value = value.round().clip(*limits)
            codes[column] = value
            value *= step[group]
            value -= wanted[column]
            absorb(column, value)

    def _state(
        self, rows: int, device: torch.device
    ) -> tuple[Callable[[int], object], Callable[[int, object], None]]:
        """p = V^T e of each row, as two calls: what column j makes up for, and its own error."""
        r = self.directions.shape[1]
        if not _in_numpy(device):
            p = torch.zeros(r, rows, device=device)
            gains, directions = self._gains.to(device), self.directions.to(device)
            return lambda j: gains[j] @ p, lambda j, error: p.addr_(directions[j], error)
        gains, directions = self._gains.numpy()[:, :, None], self.directions.numpy()[:, :, None]
        p = np.zeros((r, rows), np.float32)
        products, total = np.empty_like(p), np.empty(rows, np.float32)

        def project(j: int) -> np.ndarray:
            np.multiply(p, gains[j], out=products)
            return np.add.reduce(products, 0, None, total)  # row after row: a fixed order

        def absorb(j: int, error: np.ndarray) -> None:
            np.multiply(directions[j], error, out=products)
            np.add(p, products, out=p)

        return project, absorb


def _in_numpy(device: torch.device) -> bool:
    """On a CPU: a column is a dozen short calls, and numpy's take a third of PyTorch's time."""
    return device.type == "cpu"


def _gains(rest: np.ndarray, directions: np.ndarray, order: list[int]) -> Tensor:
    """fp32 [K, r]: column j makes up for p by ``-gains[j] . p``, knowing what comes after it.

    Later columns, were they not rounded, leave ``p^T S p`` of |p|^2, ``S = (I + sum over them of
    v v^T / rest)^-1``; each takes its rank-one part off (Sherman-Morrison).
    """
    left = np.eye(directions.shape[1])
    gains = np.empty_like(directions)
    for j in reversed(order):
        reach = (left * directions[j]).sum(1)
        energy = rest[j] + (directions[j] * reach).sum()
        gains[j] = reach / energy
        left -= reach[:, None] * gains[j]
    return torch.from_numpy(gains.astype(np.float32))


def _check(square: Tensor, directions: Tensor) -> None:
    if square.ndim != 1 or directions.ndim != 2 or len(directions) != len(square):
        raise OpError(
            "error feedback needs a mean square and some directions of each input",
            found=f"{list(square.shape)} and {list(directions.shape)}",
            needed="[K] and [K, r]",
        )
    if not (square.isfinite() & (square > 0)).all() or not directions.isfinite().all():
        raise OpError("error feedback", needed="finite numbers, mean squares above zero")
