"""Paired bootstrap intervals: two systems on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Below this many prompts a percentile interval says nothing; the table shows a gap.
MIN_PROMPTS = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; ``n`` counts prompts, the unit that is resampled."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def spans_zero(self) -> bool:
        """Whether zero lies inside: only then two systems are called indistinguishable."""
        return self.low <= 0.0 <= self.high


def prompt_means(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Mean over the seeds of each prompt.

    Seeds of one prompt are not independent pictures, so the prompt is the unit of resampling:
    treating every picture as independent would make the intervals too narrow.
    """
    groups: dict[str, list[float]] = {}
    for (prompt, _seed), value in values.items():
        groups.setdefault(prompt, []).append(value)
    return {prompt: float(np.mean(group)) for prompt, group in groups.items()}


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean; deterministic for a seed.

    With fewer than :data:`MIN_PROMPTS` values the interval is infinite: it decides nothing.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("a mean of no values has no interval")
    mean = float(data.mean())
    if data.size < MIN_PROMPTS:
        return Interval(mean, float("-inf"), float("inf"), int(data.size))
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, data.size, size=(resamples, data.size))
    means = data[picks].mean(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, (tail, 1.0 - tail))
    return Interval(mean, float(low), float(high), int(data.size))


def paired_difference(
    a: Mapping[tuple[str, int], float],
    b: Mapping[tuple[str, int], float],
    **options: float | int,
) -> Interval | None:
    """Interval of ``mean(a - b)`` over the (prompt, seed) pairs that both have; ``None`` if none.

    Pairing removes the spread between prompts, which is far larger than that between levels.
    """
    shared = a.keys() & b.keys()
    if not shared:
        return None
    difference = prompt_means({key: a[key] - b[key] for key in sorted(shared)})
    return bootstrap_mean([difference[p] for p in sorted(difference)], **options)
