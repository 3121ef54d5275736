"""What a stored code may be: a run of whole numbers, or the entries of a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STEPS = 2  # a unit: halves, as are the middles between whole numbers


class Codebook:
    """Ascending whole numbers that fit int8; a code is the number itself, not its place.

    Raises ValueError for other values.
    """

    def __init__(self, values: tuple[int, ...]) -> None:
        if list(values) != sorted(set(values)) or values[0] < -128 or values[-1] > 127:
            raise ValueError(f"no ascending int8 values: {values}")
        self.values = values
        low, high = values[0], values[-1]
        table = torch.tensor(values, dtype=torch.float32, device="cpu")
        middles = (table[1:] + table[:-1]) / 2
        halves = torch.arange(_STEPS * (high - low) + 1, dtype=torch.float32, device="cpu")
        # each half unit takes what its middle is nearest to
        self._nearest = table[torch.bucketize(halves / _STEPS + low + 0.5 / _STEPS, middles)]
        self._places = torch.zeros(256, dtype=torch.uint8, device="cpu")
        self._places[table.long() & 255] = torch.arange(len(values), dtype=torch.uint8)

    def nearest_(self, values: Tensor) -> Tensor:
        """``values`` float32, each replaced by the entry next to it; NaN by the least one.

        Within an ulp of a middle either neighbour, the same one on every machine.
        """
        low, high = self.values[0], self.values[-1]
        place = torch.fmax(values, values.new_tensor(float(low))).clamp_(max=high)
        place = place.sub_(low).mul_(_STEPS).to(torch.int32)
        if values.device.type != "cpu":
            return values.copy_(self._nearest.to(values.device)[place])
        found = np.take(self._nearest.numpy(), place.numpy(), mode="clip")  # thrice as fast
        return values.copy_(torch.from_numpy(found))

    def places(self, codes: Tensor) -> Tensor:
        """The place in the table of each of ``codes`` int8: uint8."""
        at = codes.view(torch.uint8).reshape(-1).to(torch.int32)
        return self._places.to(codes.device).index_select(0, at).view(codes.shape)


IQ4 = Codebook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
"""The table of IQ4_NL and IQ4_XS. Source: kvalues_iq4nl in ggml-common.h."""

Codes = tuple[int, int] | Codebook
"""The least and the largest of a run of codes, or a table of them."""


def round_codes_(values: Tensor, codes: Codes) -> Tensor:
    """``values`` float32, each replaced by the nearest of ``codes``; ties to even in a run."""
    if isinstance(codes, Codebook):
        return codes.nearest_(values)
    return values.round_().clamp_(*codes)


GRID_LIMIT = 127
"""Largest magnitude of a weight in units of an int8 grid."""

_SMALLEST = 1e-30


@dataclass(frozen=True, eq=False)
class Levels:
    """What codes stand for, in steps of their group: themselves, within ``limits``.

    With ``table``, fp32 [L] ascending, codes are places in it and stand for its entries. With
    ``grid``, fp32 [N, G], a step is a whole number of units only after rounding: the reader takes a
    level for ``round(level * grid) / grid``, units of at most ``GRID_LIMIT``.
    """

    limits: tuple[int, int]
    table: Tensor | None = None
    grid: Tensor | None = None

    def on(self, device: torch.device) -> Levels:
        """The same on ``device``, the grid turned as a panel's columns are."""
        table = None if self.table is None else self.table.to(device)
        grid = None if self.grid is None else self.grid.t().contiguous().to(device)
        return Levels(self.limits, table, grid)

    def round_(self, values: Tensor, groups: Tensor) -> Tensor:
        """``values`` [..., B, N], in steps, become the levels nearest to them; returns the codes.

        groups: int64 [B], the group of each of B columns.
        """
        if self.table is None:
            codes = values.round_().clamp_(*self.limits)
            codes = codes if self.grid is None else codes.clone()
        else:
            middles = (self.table[1:] + self.table[:-1]) / 2
            codes = torch.bucketize(values.contiguous(), middles)
            values.copy_(self.table[codes])
        if self.grid is not None:
            units = self.grid.index_select(0, groups)
            values.mul_(units).round_().clamp_(-GRID_LIMIT, GRID_LIMIT)
            values.div_(units.clamp_min(_SMALLEST))  # a group of zeros has no units
        return codes
