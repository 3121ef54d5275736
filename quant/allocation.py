"""Which of its storages each linear gets, so that a sum of losses is least within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .choose import Linear


class Rung(NamedTuple):
    """One storage of one linear: its bytes, what it loses, its name."""

    nbytes: int
    loss: float
    name: str


def allocate(rungs: Mapping[Linear, Sequence[Rung]], budget: int) -> dict[Linear, Rung]:
    """For each linear one of its rungs: the least summed loss found of ``budget`` bytes or fewer.

    Everything starts at its smallest rung, which must fit. Steps along the lower convex hull,
    largest gain a byte first, are the optimum of the budget that they end at; what is left, less
    than one step, goes to whatever single step still gains most.
    """
    ladders = {key: _useful(options) for key, options in rungs.items()}
    at = dict.fromkeys(ladders, 0)
    left = budget - sum(ladder[0].nbytes for ladder in ladders.values())
    queue: list[tuple[float, str, Linear, int]] = []
    for key in ladders:
        _offer(queue, ladders[key], key, 0)
    while queue:
        _, _, key, to = heapq.heappop(queue)
        cost = ladders[key][to].nbytes - ladders[key][at[key]].nbytes
        if cost > left:
            continue
        left -= cost
        at[key] = to
        _offer(queue, ladders[key], key, to)
    while (step := _best_step(ladders, at, left)) is not None:
        key, to = step
        left -= ladders[key][to].nbytes - ladders[key][at[key]].nbytes
        at[key] = to
    return {key: ladders[key][place] for key, place in at.items()}


def _useful(options: Sequence[Rung]) -> list[Rung]:
    """By rising size, without those that a smaller one is as good as."""
    kept: list[Rung] = []
    for rung in sorted(options, key=lambda rung: (rung.nbytes, rung.loss)):
        if not kept or rung.loss < kept[-1].loss:
            kept.append(rung)
    return kept


def _offer(queue: list, ladder: Sequence[Rung], key: Linear, place: int) -> None:
    """Queue the step up from ``place`` with the largest gain a byte, if there is one."""
    here = ladder[place]
    steps = [
        ((here.loss - rung.loss) / (rung.nbytes - here.nbytes), to)
        for to, rung in enumerate(ladder[place + 1 :], place + 1)
    ]
    if steps:
        gain, to = max(steps)
        heapq.heappush(queue, (-gain, str(key), key, to))


def _best_step(
    ladders: Mapping[Linear, Sequence[Rung]], at: Mapping[Linear, int], left: int
) -> tuple[Linear, int] | None:
    """The single step up within ``left`` bytes that gains most."""
    steps = [
        (ladder[at[key]].loss - rung.loss, str(key), key, to)
        for key, ladder in ladders.items()
        for to, rung in enumerate(ladder)
        if to > at[key] and rung.nbytes - ladder[at[key]].nbytes <= left
    ]
    return max(steps)[2:] if steps else None
