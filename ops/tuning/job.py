"""One measurement to make, and the inputs that are made for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .choices import Key, Table

# A part of the output channels stands for the whole: on a CPU, where time grows with them, as many
# as make this many weights; elsewhere as many as fit the memory, in steps of this many.
_CPU_WEIGHTS = 1 << 22
_ROW_STEP = 256


@dataclass(frozen=True)
class Job:
    """One measurement to make: what it is of, its candidates and the bytes that it takes.

    ``make(tokens)`` allocates the inputs and returns one closure a candidate; ``scale`` is the
    whole layer over the part of it that is timed; ``after``: not needed where decoding to floats
    won one of those.
    """

    key: Key
    candidates: tuple[str, ...]
    nbytes: int
    make: Callable[[int], Mapping[str, Callable[[], Tensor]]]
    scale: float = 1.0
    errors: Callable[[], Mapping[str, float]] | None = None
    after: tuple[Key, ...] = ()

    def is_settled(self, table: Table) -> bool:
        """Whether ``table`` says already what this would tell."""
        before = (table.get(key) for key in self.after)
        if any(m is not None and m.ranking[0] == "dense" for m in before):
            return True
        known = table.get(self.key)
        return known is not None and set(self.candidates) <= set(known.seconds)


def some_rows(n: int, k: int, device: torch.device, fitting: int) -> int:
    """How many of the N output channels are timed, of which ``fitting`` fit the memory."""
    if device.type == "cpu":
        return min(n, max(1, _CPU_WEIGHTS // k))
    return n if fitting >= n else min(n, max(1, fitting // _ROW_STEP) * _ROW_STEP)


def random_values(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Standard normal, or int8 of -127..127, from a generator of its own: seeds are the user's."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, device=device, dtype=dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
