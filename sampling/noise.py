"""Seeds of noise that differ: torch's CPU generator takes the low 32 bits of a seed, no more."""

from __future__ import annotations

from collections.abc import Iterable

_BITS = 32
NOISES = 1 << _BITS
"""How many seeds give noise of their own; two that differ by this give the same."""
_HALF_WAY = 1 << (_BITS - 1)
# Odd, so that its multiples reach every number of 32 bits before one comes again.
_STRIDE = 0x9E3779B9


def noise_seeds(wanted: Iterable[int], passes: int = 1) -> list[list[int]]:
    """For each pass a seed for each of ``wanted``, all different in their low 32 bits.

    The first pass has the low bits of ``wanted`` itself, the others start half of all seeds away;
    a seed that is taken already moves on to a free one. The same arguments give the same seeds.
    """
    taken: set[int] = set()

    def free(seed: int) -> int:
        seed %= 1 << _BITS
        while seed in taken:
            seed = (seed + _STRIDE) % (1 << _BITS)
        taken.add(seed)
        return seed

    wanted = list(wanted)
    return [[free(seed + number * _HALF_WAY) for seed in wanted] for number in range(passes)]
