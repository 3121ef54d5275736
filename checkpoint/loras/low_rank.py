"""A low-rank update of one linear, which a side path applies, and how several become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """An update of one linear: ``W + up @ down``; up [N, r] carries alpha / r."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]


def stack(updates: Iterable[tuple[LowRank, float]]) -> LowRank:
    """Several updates of one linear, with their strengths, as one of the summed rank."""
    updates = list(updates)
    down = torch.cat([u.down for u, _ in updates])
    up = torch.cat([u.up * strength for u, strength in updates], dim=1)
    return LowRank(down, up)


def in_rows(update: LowRank, start: int, rows: int) -> LowRank:
    """The update of some rows of a fused linear as one of all its ``rows``, zero elsewhere."""
    up = update.up.new_zeros(rows, update.rank)
    up[start : start + len(update.up)] = update.up
    return LowRank(update.down, up)
