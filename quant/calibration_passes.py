"""The two passes of a calibration: the same prompts and seeds, from one noise and from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..sampling import noise_seeds
from .profiler import Profiler


def run_passes(
    profiler: Profiler,
    prompts: int,
    seeds: Sequence[int],
    sample: Callable[[int, int], None],
) -> None:
    """Call ``sample(prompt's index, seed of the noise)`` for ``prompts`` x ``seeds``, twice.

    Prompt i starts from the noise of seed + i where no other has it. The first pass gathers the
    statistics, the second measures the errors: from noise that no call before it had, and each
    prompt (or seed, if there is one prompt) with the smoothing that it had no part in.
    """
    calls = [(i, j, seed + i) for i in range(prompts) for j, seed in enumerate(seeds)]
    noises = noise_seeds((noise for *_, noise in calls), passes=2)
    for phase, chosen in zip((profiler.statistics, profiler.errors), noises, strict=True):
        with phase():
            for (i, j, _), noise in zip(calls, chosen, strict=True):
                profiler.sample(i if prompts > 1 else j)
                profiler.at(profiler.times[0])
                sample(i, noise)
