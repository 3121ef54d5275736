"""How long a step takes whose weights come over the bus: a simulation of the order of events.

Two things happen beside each other on a card: copies, one after the other, and the work, one kernel
after the other. An event is ``(what, index, after)``, as `ops.lanes.HostLane` writes them
down in a real run: ``("fetch", 2, 0)`` may begin when run 0 has ended, ``("run", 2, 2)`` when fetch
2 has. Each waits besides for those of its kind that were asked for before it. Assumed: the host
asks for them earlier than the card gets to them, and weights lie in pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

from . import sizes
from .block import FUSED, LAYERS, LINEARS, How, block_seconds
from .known import CARDS, Card
from .picture import QUALITY, Job

Event = tuple[str, int, int | None]
Seconds = Callable[[int], float]

SLOTS = 2
LEVELS = ("INT8 W8A8 rotated", "Q4_K")
_ORDER = ("qkv", "attention", "o", "w1", "w3", "w2")  # of a block's operations


def simulate(events: Sequence[Event], fetch: Seconds, run: Seconds) -> float:
    """Seconds until the last event has ended; ``fetch`` and ``run``: seconds by index.

    Raises KeyError for an event that waits for one that was not asked for before it.
    """
    ended: dict[tuple[str, int], float] = {}
    lane = {"fetch": 0.0, "run": 0.0}
    for what, index, after in events:
        other = "run" if what == "fetch" else "fetch"
        ready = 0.0 if after is None else ended[other, after]
        seconds = (fetch if what == "fetch" else run)(index)
        lane[what] = ended[what, index] = max(lane[what], ready) + seconds
    return max(lane.values())


def ahead(blocks: int, fetched: Sequence[int], passes: int = 1) -> Iterator[Event]:
    """Passes with two slots: the next of ``fetched`` comes as soon as a slot is free."""
    free: list[int | None] = [None] * SLOTS
    for _ in range(passes):
        waiting = list(fetched)
        for block in range(blocks):
            if block not in fetched:
                yield "run", block, None
                continue
            while free and waiting:
                yield "fetch", waiting.pop(0), free.pop(0)
            yield "run", block, block
            free.append(block)
            if waiting:
                yield "fetch", waiting.pop(0), free.pop(0)


def one_by_one(operations: int, fetched: Sequence[int]) -> Iterator[Event]:
    """Each weight asked for when its operation comes, over two streams in turn: the host's order
    without a queue. A stream is free when the operation that used it last has run."""
    used: list[int] = []
    for operation in range(operations):
        if operation in fetched:
            yield "fetch", operation, used[-SLOTS] if len(used) >= SLOTS else None
            used.append(operation)
        yield "run", operation, operation if operation in fetched else None


@dataclass(frozen=True)
class Step:
    """Seconds of one step: all work, all transfers, and the two orders of events."""

    compute: float
    transfer: float
    ahead: float
    one_by_one: float

    @property
    def bound(self) -> float:
        """No order is faster."""
        return max(self.compute, self.transfer)


def step(
    card: Card,
    level: str,
    job: Job = QUALITY,
    how: How = FUSED,
    fetched: Sequence[int] | None = None,
) -> Step:
    """A step of every copy, with those blocks ``fetched`` that are given; None: all."""
    fetched = tuple(range(LAYERS)) if fetched is None else tuple(fetched)
    passes = [_pass(card, level, tokens, how, fetched) for tokens in job.copies]
    return Step(*(sum(seconds) for seconds in zip(*map(astuple, passes), strict=True)))


def _pass(card: Card, level: str, tokens: int, how: How, fetched: Sequence[int]) -> Step:
    """The same of one copy."""
    transfer = card.transfer_seconds(sizes.block_bytes(level), how.efficiency)
    work = block_seconds(card, level, tokens, how).total
    shares = _shares(card, level, tokens, how)
    weights = sum(_weights(name) for name in LINEARS)
    operations = [(block, name) for block in range(LAYERS) for name in _ORDER]
    weighing = [
        i for i, (block, name) in enumerate(operations) if block in fetched and name in LINEARS
    ]
    return Step(
        compute=LAYERS * work,
        transfer=len(fetched) * transfer,
        ahead=simulate(list(ahead(LAYERS, fetched)), lambda _: transfer, lambda _: work),
        one_by_one=simulate(
            list(one_by_one(len(operations), weighing)),
            lambda i: transfer * _weights(operations[i][1]) / weights,
            lambda i: shares[operations[i][1]],
        ),
    )


def _weights(operation: str) -> int:
    n, k = LINEARS[operation]
    return n * k


def _shares(card: Card, level: str, tokens: int, how: How) -> dict[str, float]:
    """Seconds of a block's operations: attention as modelled, all else by the linears' weights."""
    parts = block_seconds(card, level, tokens, how)
    attention = parts.attention + parts.heads
    weights = sum(_weights(name) for name in LINEARS)
    rest = {name: (parts.total - attention) * _weights(name) / weights for name in LINEARS}
    return {**rest, "attention": attention}


def table(cards: Sequence[Card] = CARDS, levels: Sequence[str] = LEVELS) -> Iterator[str]:
    """Lines of the Markdown table of steps whose blocks are all fetched."""
    yield (
        "| card | level | work | transfers | a block ahead | x the longer | weight by weight | "
        "x the longer |"
    )
    yield "| --- | --- |" + " ---: |" * 6
    for card in cards:
        for level in levels:
            s = step(card, level)
            yield (
                f"| {card.name} | {level} | {s.compute:.3f} s | {s.transfer:.3f} s | "
                f"{s.ahead:.3f} s | **{s.ahead / s.bound:.2f}** | {s.one_by_one:.3f} s | "
                f"{s.one_by_one / s.bound:.2f} |"
            )


if __name__ == "__main__":
    print("\n".join(table()))
