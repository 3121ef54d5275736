"""Bootstrap intervals, verdicts and the Pareto front of the comparison."""

import math

import numpy as np
import pytest

from ideogram4_quant.engine.compare import results, statistics
from ideogram4_quant.engine.compare.cases import Case


def test_interval_covers_the_true_mean_about_as_often_as_promised():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        data = generator.normal(2.0, 1.0, size=40)
        interval = statistics.bootstrap_mean(data, resamples=1000, seed=trial)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_interval_is_deterministic_and_contains_the_mean():
    data = [1.0, 2.0, 4.0, 8.0]
    first, second = statistics.bootstrap_mean(data), statistics.bootstrap_mean(data)
    assert first == second
    assert first.low <= first.mean == 3.75 <= first.high


def test_too_few_prompts_decide_nothing():
    interval = statistics.bootstrap_mean([1.0, 1.0])
    assert interval.spans_zero
    assert math.isinf(interval.low)


def test_pairing_finds_a_small_effect_under_a_large_spread():
    generator = np.random.default_rng(2)
    level = {(f"p{i}", s): generator.normal(0, 10) for i in range(64) for s in (0, 1)}
    shifted = {key: value + 0.5 + generator.normal(0, 0.5) for key, value in level.items()}
    difference = statistics.paired_difference(shifted, level)
    assert not difference.spans_zero
    assert difference.mean == pytest.approx(0.5, abs=0.2)
    unpaired = statistics.bootstrap_mean(list(shifted.values()))
    assert unpaired.spans_zero


def test_seeds_of_one_prompt_are_one_unit():
    few = {(f"p{i}", s): float(i) for i in range(4) for s in range(100)}
    interval = statistics.bootstrap_mean(list(statistics.prompt_means(few).values()))
    assert interval.n == 4
    assert interval.high - interval.low > 1.0


def test_paired_difference_without_shared_pictures_is_a_gap():
    assert statistics.paired_difference({("a", 0): 1.0}, {("b", 0): 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (-1.0, 1.0, "higher", "indistinguishable"),
        (0.0, 1.0, "higher", "indistinguishable"),
        (0.1, 1.0, "higher", "better"),
        (-1.0, -0.1, "higher", "worse"),
        (0.1, 1.0, "lower", "worse"),
        (-1.0, -0.1, "lower", "better"),
    ],
)
def test_verdict(low, high, better, expected):
    interval = statistics.Interval((low + high) / 2, low, high, 10)
    assert results.verdict(interval, better) == expected


def test_fewer_prompts_than_an_interval_needs_give_no_verdict():
    few = statistics.bootstrap_mean([1.0, 1.0])
    assert results.verdict(few, "higher") is None


def test_pareto_front_keeps_what_nothing_beats():
    points = [(10.0, 40.0), (5.0, 30.0), (7.0, 29.0), (12.0, 40.0), (10.0, 39.0)]
    assert results.pareto_front(points) == [1, 0]


def _comparison(values: dict[str, dict]) -> results.Comparison:
    cases = [Case(f"prompt {i}", s, 64, 64, text="A") for i in range(4) for s in (0, 1)]
    systems = []
    for name, by_metric in values.items():
        system = results.SystemScores(name, name, 1000)
        for metric, function in by_metric.items():
            for i, case in enumerate(cases):
                value = function(i)
                if value is not None:
                    system.set(metric, case.key, value)
        systems.append(system)
    return results.Comparison("ref", cases, systems)


def test_a_missing_metric_is_a_gap_not_a_zero():
    comparison = _comparison(
        {"ref": {"ocr_exact": lambda i: 1.0}, "a": {"psnr": lambda i: 30.0 + i}}
    )
    assert comparison.metrics() == ["psnr", "ocr_exact"]
    assert comparison.cell(comparison.system("a"), "ocr_exact") is None
    assert comparison.cell(comparison.system("ref"), "psnr") is None


def test_text_verdict_is_paired_with_the_reference():
    comparison = _comparison(
        {"ref": {"ocr_exact": lambda i: 1.0}, "a": {"ocr_exact": lambda i: 0.0}}
    )
    cell = comparison.cell(comparison.system("a"), "ocr_exact")
    assert cell.verdict == "worse"
    assert cell.difference.mean == -1.0
    assert comparison.cell(comparison.system("ref"), "ocr_exact").verdict is None
