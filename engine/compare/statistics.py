"""Paired intervals: two systems on the same prompts and seeds.

The interval of a mean covers the true mean in at least 95 % of cases: in that many on normal and on
heavy-tailed symmetric values, from :data:`MIN_PROMPTS` on; up to two points less on values as
skewed as the exponential distribution (tests/test_compare_statistics.py simulates both). It holds
for one metric of one system: nothing corrects for the number of rows and metrics of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: Below this many prompts there is no interval, and the table says so: with five, even five
#: differences of one sign come about by chance in 6 % of cases (2 / 2**5); with six, in 3 %.
MIN_PROMPTS = 6

#: How the intervals are made, for legends.
METHOD = "Student's t, widened by a studentized bootstrap where values are skewed"
UNCORRECTED = (
    "Rows and metrics are not corrected for their number: of 20 verdicts, one may be chance."
)

_RESAMPLES = 4_999


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; ``n`` counts prompts, the unit that is resampled."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether there were prompts enough for an interval."""
        return self.n >= MIN_PROMPTS

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


def mean_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of independent values; deterministic for a seed.

    From the lower of two lower ends to the higher of two upper ends: Student's t, exact for normal
    values, and the studentized bootstrap, which follows their skewness. With fewer than
    :data:`MIN_PROMPTS` values the interval is infinite: it decides nothing.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("a mean of no values has no interval")
    mean, n = float(data.mean()), int(data.size)
    if n < MIN_PROMPTS:
        return Interval(mean, float("-inf"), float("inf"), n)
    rest = data - mean
    error = math.sqrt(float(rest @ rest) / (n - 1) / n)
    if error <= abs(mean) * 1e-12:  # equal values, but for rounding
        return Interval(mean, mean, mean, n)
    widest = student_quantile(n - 1, confidence)
    low, high = _studentized_tails(rest, confidence, resamples, seed)
    return Interval(mean, mean - max(widest, high) * error, mean + max(widest, -low) * error, n)


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
    return mean_interval([difference[p] for p in sorted(difference)], **options)


def _studentized_tails(
    rest: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The two tails of (mean of a resample) / (its standard error), for values of mean 0.

    Resamples of equal values have no standard error and are left out.
    """
    counts = _picks(rest.size, resamples, seed)
    n = rest.size
    means = counts @ rest / n
    variances = counts @ np.square(rest) / n - np.square(means)
    varied = variances > 1e-12 * float(rest @ rest) / n  # more than rounding leaves of equal values
    ratios = means[varied] / np.sqrt(variances[varied] / (n - 1))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, (tail, 1.0 - tail))
    return float(low), float(high)


@lru_cache(maxsize=4)
def _picks(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample has each value: float64 ``[resamples, n]``, equal for all cells."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


@lru_cache
def student_quantile(freedom: int, confidence: float = 0.95) -> float:
    """t with P(-t < T < t) = ``confidence``, T Student's of ``freedom`` degrees, by bisection."""
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < confidence:
        high *= 2.0
    for _ in range(80):
        middle = (low + high) / 2.0
        below = _student_within(middle, freedom) < confidence
        low, high = (middle, high) if below else (low, middle)
    return high


def _student_within(t: float, freedom: int) -> float:
    """P(-t < T < t), the finite sum for whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    total *= math.sin(angle)
    return (angle + total) * 2.0 / math.pi if odd else total
