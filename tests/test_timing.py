"""The clock of the tests that hold a call to a time: what it counts, and when it tries again."""

import time
from functools import partial

import torch

from ideogram4_quant.ops.tuning import timing as timing_module
from ideogram4_quant.ops.tuning.timing import medians
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


# ---- the timer of measured choices


CPU = torch.device("cpu")


def test_a_warm_up_is_never_kept_as_a_measurement():
    """The first run compiles (here 60 ms); the deadline passes in it."""
    calls = []

    def compiles_first():
        calls.append(None)
        time.sleep(0.06 if len(calls) == 1 else 0.002)

    deadline = time.perf_counter() + 0.05
    assert medians({"a": compiles_first}, CPU, deadline=deadline) is None
    calls.clear()
    assert medians({"a": compiles_first}, CPU)["a"] < 0.03


def test_no_median_of_one_value():
    """Warm-up and one run reach the deadline: nothing is said; two runs are enough."""
    for runs, known in ((1, False), (2, False), (3, True)):
        calls: list[None] = []

        def work(runs=runs, calls=calls):
            calls.append(None)
            return len(calls) >= runs

        found = _medians_until(work, runs)
        assert (found is not None) == known


def _medians_until(work, runs):
    """``medians`` of ``work`` whose deadline passes with run number ``runs``."""
    passed = []

    def run():
        time.sleep(0.003)
        if work():
            passed.append(None)

    real = time.perf_counter

    class Clock:
        def perf_counter(self):
            return real() + (1e6 if passed else 0.0)

    old, timing_module.time = timing_module.time, Clock()
    try:
        return medians({"a": run}, CPU, deadline=real() + 1e5)
    finally:
        timing_module.time = old


def test_each_is_run_once_beside_its_warm_up_after_the_deadline():
    calls = []
    found = medians({"a": lambda: calls.append(None)}, CPU, deadline=0.0, each=True)
    assert len(calls) == 2
    assert found["a"] > 0


def test_what_is_short_is_run_more_often_than_the_rounds(monkeypatch):
    now, calls = [0.0], {"short": 0, "long": 0}

    class Clock:  # a real one would measure what else the machine does
        def perf_counter(self):
            return now[0]

    monkeypatch.setattr(timing_module, "time", Clock())
    monkeypatch.setattr(timing_module, "_CPU_CACHE", 1)

    def run(name, seconds):
        calls[name] += 1
        now[0] += seconds

    medians({"short": lambda: run("short", 1e-5), "long": lambda: run("long", 0.01)}, CPU, rounds=3)
    assert calls["long"] == 4
    assert 4 < calls["short"] <= 1 + 1 + 2 * 10 + 10


def test_the_cache_is_written_over_before_every_run(monkeypatch):
    written = []
    scratch = torch.ones(8, dtype=torch.uint8)
    monkeypatch.setattr(timing_module.torch, "empty", lambda *a, **k: scratch)

    def run():
        written.append(int(scratch.sum()))
        scratch.fill_(1)
        time.sleep(0.003)

    medians({"a": run}, CPU, rounds=2)
    assert written == [0, 0, 0]


def test_events_keep_the_time_where_the_device_has_them(monkeypatch):
    """Events that say 7 ms, whatever the host's clock says of the launch."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def elapsed_time(self, end):
            assert recorded[-2:] == [self, end]
            return 7.0

    monkeypatch.setattr(timing_module, "_event_of", lambda device: Event)
    assert medians({"a": lambda: time.sleep(0.003)}, CPU, rounds=2) == {"a": 0.007}
    assert len(recorded) == 6
