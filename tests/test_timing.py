"""The clock of the tests that hold a call to a time: what it counts, and when it tries again."""

import time
from functools import partial

from ideogram4_quant.tests import timing
from ideogram4_quant.tests.timing import cpu_seconds


def test_ten_times_the_work_is_ten_times_the_time():
    def work(times: int) -> None:
        for _ in range(times * 10):
            sum(range(20_000))

    one, ten = (cpu_seconds(partial(work, times)) for times in (1, 10))
    assert 5 * one < ten < 20 * one


def test_waiting_is_no_work():
    assert cpu_seconds(lambda: time.sleep(0.2), tries=1) < 0.02


def test_a_call_over_the_limit_is_tried_again_and_one_under_it_is_not():
    calls = []
    cpu_seconds(lambda: calls.append(sum(range(20_000))), limit=1e-6)
    assert len(calls) == 5
    cpu_seconds(lambda: calls.append(None), limit=10.0)
    assert len(calls) == 6


def test_seconds_of_a_slower_machine_are_longer(monkeypatch):
    """Where the known work takes twice as long, a call counts half of what it took."""
    took = iter([0.02, 3.0, 0.03])  # of the work before, the call, the work after
    monkeypatch.setattr(timing, "_thread_seconds", lambda function: next(took))
    assert cpu_seconds(lambda: None, limit=2.0) == 1.5
    took = iter([0.09, 3.0, 0.001])  # a disturbance, and a faster machine: none shorter
    assert cpu_seconds(lambda: None, limit=4.0) == 3.0
