"""Which of its storages each linear gets, so that a sum of losses is least within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
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


def without(
    rungs: Mapping[Linear, Sequence[Rung]], name: str, budget: int
) -> Mapping[Linear, Sequence[Rung]]:
    """The same without the rungs of ``name``, if ``budget`` bytes hold what is left; else all."""
    left = {key: [rung for rung in own if rung.name != name] for key, own in rungs.items()}
    if not all(left.values()):
        return rungs
    least = sum(min(rung.nbytes for rung in own) for own in left.values())
    return left if least <= budget else rungs


def allocate_within(
    rungs: Mapping[Linear, Sequence[Rung]],
    budget: int,
    seconds: Mapping[Linear, Mapping[str, float]],
    limit: float,
) -> dict[Linear, Rung] | None:
    """As ``allocate``, with ``limit`` summed ``seconds`` or fewer too; None where there is none.

    Both limits become one cost, in several mixtures; each is filled as far as both hold, and the
    least loss of all is taken.
    """

    def fits(found: Mapping[Linear, Rung]) -> bool:
        small = sum(rung.nbytes for rung in found.values()) <= budget
        return small and sum(seconds[k][r.name] for k, r in found.items()) <= limit

    least = {key: min(seconds[key].values()) for key in rungs}
    spare = max(limit - sum(least.values()), 1e-9)
    best: dict[Linear, Rung] | None = None
    for mixture in range(_MIXTURES + 1):
        share = mixture / _MIXTURES
        costs = {
            key: [
                Rung(
                    round(
                        _UNIT * (1 - share) * rung.nbytes / budget
                        + _UNIT * share * (seconds[key][rung.name] - least[key]) / spare
                    ),
                    rung.loss,
                    rung.name,
                )
                for rung in own
            ]
            for key, own in rungs.items()
        }  # fmt: skip
        found = _filled(rungs, costs, fits)
        if found is not None and (best is None or _loss(found) < _loss(best)):
            best = found
    return best


_MIXTURES = 8
_WALK, _HALVINGS = 24, 6
_UNIT = 10**9  # of a cost, to whole numbers


def _loss(found: Mapping[Linear, Rung]) -> float:
    return sum(rung.loss for rung in found.values())


def _filled(
    rungs: Mapping[Linear, Sequence[Rung]],
    costs: Mapping[Linear, Sequence[Rung]],
    fits: Callable[[Mapping[Linear, Rung]], bool],
) -> dict[Linear, Rung] | None:
    """The least loss of those that ``fits`` along the costs, which need not fit from the least on:
    a coarse walk, then halvings after its best."""
    named = {key: {rung.name: rung for rung in own} for key, own in rungs.items()}
    low = sum(min(rung.nbytes for rung in own) for own in costs.values())
    high = sum(max(rung.nbytes for rung in own) for own in costs.values())
    best: tuple[float, int, dict[Linear, Rung]] | None = None

    def tried(cost: int) -> bool:
        nonlocal best
        found = {k: named[k][rung.name] for k, rung in allocate(costs, cost).items()}
        if not fits(found):
            return False
        if best is None or _loss(found) < best[0]:
            best = _loss(found), cost, found
        return True

    for at in range(_WALK + 1):
        tried(low + (high - low) * at // _WALK)
    if best is None:
        return None
    start, step = best[1], (high - low) // _WALK
    for _ in range(_HALVINGS):
        step //= 2
        if tried(start + step):
            start += step
    return best[2]


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
