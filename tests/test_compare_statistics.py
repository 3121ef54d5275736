"""Bootstrap intervals, verdicts and the Pareto front of the comparison."""

import math
import re

import numpy as np
import pytest

from ideogram4_quant.engine.compare import results, statistics, tables
from ideogram4_quant.engine.compare.cases import Case

#: Values of known mean, by how they are drawn, and the least coverage asked of 400 trials:
#: three standard errors (1.1 points each) below 95 %; of skewed values two points less.
DRAWN = {
    "normal": (lambda g, size: g.normal(size=size), 0.0, 0.917),
    "heavy tails": (lambda g, size: g.standard_t(3, size=size), 0.0, 0.917),
    "exponential": (lambda g, size: g.exponential(size=size), 1.0, 0.897),
    "one word in seven": (
        lambda g, size: g.choice([-1.0, 0.0, 1.0], p=[0.15, 0.7, 0.15], size=size), 0.0, 0.917,
    ),
}  # fmt: skip


@pytest.mark.parametrize("prompts", [6, 12, 32])
@pytest.mark.parametrize("kind", DRAWN)
def test_interval_covers_the_true_mean_as_often_as_promised(kind, prompts):
    draw, true, least = DRAWN[kind]
    trials = draw(np.random.default_rng(5), (400, prompts))
    found = [statistics.mean_interval(values, resamples=999) for values in trials]
    covered = np.mean([i.low <= true <= i.high for i in found])
    assert covered >= least
    if kind == "normal":  # and is not simply wide: 1.3 times Student's t at most
        widths = [(i.high - i.low) / v.std(ddof=1) for i, v in zip(found, trials, strict=True)]
        t = {6: 2.571, 12: 2.201, 32: 2.040}[prompts]
        assert np.median(widths) <= 1.3 * 2 * t / math.sqrt(prompts)


@pytest.mark.parametrize(
    ("freedom", "confidence", "table"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (5, 0.95, 2.571), (11, 0.95, 2.201), (31, 0.95, 2.040),
     (10, 0.99, 3.169), (100, 0.95, 1.984)],
)  # fmt: skip
def test_quantiles_are_those_of_printed_tables(freedom, confidence, table):
    assert statistics.student_quantile(freedom, confidence) == pytest.approx(table, abs=5e-4)


def test_equal_differences_have_an_interval_without_width():
    interval = statistics.mean_interval([0.1] * 6)
    assert interval.low == interval.high == interval.mean
    assert not interval.spans_zero


def test_interval_is_deterministic_and_contains_the_mean():
    data = [1.0, 2.0, 4.0, 8.0, 3.0, 4.5]
    first, second = statistics.mean_interval(data), statistics.mean_interval(data)
    assert first == second
    assert first.low <= first.mean == 3.75 <= first.high


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_too_few_prompts_decide_nothing(prompts):
    interval = statistics.mean_interval([1.0] * prompts)
    assert not interval.known
    assert interval.spans_zero
    assert math.isinf(interval.low)


def test_pairing_finds_a_small_effect_under_a_large_spread():
    generator = np.random.default_rng(2)
    level = {(f"p{i}", s): generator.normal(0, 10) for i in range(64) for s in (0, 1)}
    shifted = {key: value + 0.5 + generator.normal(0, 0.5) for key, value in level.items()}
    difference = statistics.paired_difference(shifted, level)
    assert not difference.spans_zero
    assert difference.mean == pytest.approx(0.5, abs=0.2)
    unpaired = statistics.mean_interval(list(shifted.values()))
    assert unpaired.spans_zero


def test_seeds_of_one_prompt_are_one_unit():
    few = {(f"p{i}", s): float(i) for i in range(6) for s in range(100)}
    interval = statistics.mean_interval(list(statistics.prompt_means(few).values()))
    assert interval.n == 6
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
    few = statistics.mean_interval([1.0, 1.0])
    assert results.verdict(few, "higher") is None


def test_pareto_front_keeps_what_nothing_beats():
    points = [(10.0, 40.0), (5.0, 30.0), (7.0, 29.0), (12.0, 40.0), (10.0, 39.0)]
    assert results.pareto_front(points) == [1, 0]


def _comparison(values: dict[str, dict]) -> results.Comparison:
    cases = [Case(f"prompt {i}", s, 64, 64, text="A") for i in range(6) for s in (0, 1)]
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


def test_legends_say_what_is_not_corrected():
    comparison = _comparison({"ref": {"ocr_exact": lambda i: 1.0}})
    assert "not corrected for their number" in tables.markdown(comparison)
    assert "Student" in tables.markdown(comparison)


def test_a_bar_in_a_name_does_not_break_the_table():
    comparison = _comparison(
        {"ref": {"ocr_exact": lambda i: 1.0}, "a|b\nc": {"ocr_exact": lambda i: 1.0}}
    )
    head, _, *rows = tables.table(comparison).splitlines()
    assert len(rows) == 2
    bars = [len(re.findall(r"(?<!\\)\|", row)) for row in (head, *rows)]
    assert len(set(bars)) == 1
    assert r"a\|b c" in rows[1]
