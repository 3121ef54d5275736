"""Measured choices: what is timed, kept and obeyed; the times themselves are faked."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ideogram4_quant.ops import blocks, dispatch, reference
from ideogram4_quant.ops.gguf_compute import FEW_TOKENS
from ideogram4_quant.ops.layouts import QuantizedTensor
from ideogram4_quant.ops.linear import LinearOptions, gguf_linear, int8_linear
from ideogram4_quant.ops.tuning import autotune, choices, tuning_jobs
from ideogram4_quant.ops.tuning.autotune import Layer, Measure, layers_of, tune
from ideogram4_quant.ops.tuning.choices import ALWAYS_DENSE, GGUF, LINEAR, Key, Measurement, Table
from ideogram4_quant.tests.linear_cases import CPU
from ideogram4_quant.tests.tensors import randn
from ideogram4_quant.tests.tuning_cases import INT8, Q4_K, fake_times, linear_key

pytestmark = pytest.mark.usefixtures("nothing_measured")


def test_layers_are_counted_by_kind_and_shape():
    rotated = QuantizedTensor.from_float(randn(8, 64), "Ideogram4QuantInt8", rotation=64)
    packed = QuantizedTensor.from_float(randn(64, 256), "Ideogram4QuantGGUF", qtype="Q4_K")
    fp8 = QuantizedTensor.from_float(randn(8, 64), "Ideogram4QuantFP8")
    plain = QuantizedTensor.from_float(randn(8, 64), "Ideogram4QuantInt8")
    found = layers_of([rotated, plain, fp8, randn(4, 4), packed, plain])
    assert found == (Layer("Q4_K", 64, 256), Layer("int8", 8, 64), Layer("int8", 8, 64, 64))


def test_a_real_measurement_finds_every_candidate(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        table = tune([INT8, Q4_K], CPU, torch.float32, Measure(tmp_path))
    found = table.get(linear_key(INT8))
    assert set(found.seconds) == {"int_mm", "reference"}
    assert all(0 < value < 5 for value in found.seconds.values())
    assert set(table.get(Key(GGUF, 48, 256, 2048, "float32", "Q4_K")).seconds) == {"w8a8", "dense"}
    # Q4_K runs as a rotated int8 product, which is measured as one
    assert table.get(linear_key(Layer("int8", 48, 256, 256))) is not None
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("measured on cpu")]
    assert len(lines) == len(table) == len(autotune.describe(CPU)) >= 3
    assert "int8 linear 256 -> 48, 512 tokens, float32: " in autotune.describe(CPU)[0]


def test_the_choice_follows_the_measurement(tmp_path, monkeypatch):
    fake_times(monkeypatch, int_mm=2e-3, reference=1e-3)
    assert dispatch.choose("int8_linear", (5, 48, 256), CPU).name == "int_mm"
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    for op in ("int8_linear", "int8_gemm"):
        for tokens in (1, 512, 5000):
            where = ((tokens, 48, 256), CPU)
            assert dispatch.choose(op, *where, dtype=torch.float32, rotation=0).name == "reference"
            assert dispatch.choose(op, *where, dtype=torch.bfloat16).name == "int_mm"
            assert dispatch.choose(op, *where, rotation=256).name == "int_mm"
    assert dispatch.choose("int8_gemm", (5, 48, 512), CPU).name == "int_mm"
    assert dispatch.choose("int8_linear", (5, 48, 256), CPU, "int_mm").name == "int_mm"
    # what needs the product alone takes the fastest that has it
    probes = {**dispatch._PROBES, "reference": lambda device: (dispatch.Backend("reference"), "")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    assert dispatch.choose("int8_gemm", (5, 48, 256), CPU).name == "int_mm"


def test_the_nearest_measured_token_count_decides():
    times = {512: {"int_mm": 1.0, "reference": 2.0}, 4608: {"int_mm": 2.0, "reference": 1.0}}
    table = Table(Measurement(linear_key(INT8, tokens), t) for tokens, t in times.items())
    choices.remember(CPU, table)
    for tokens, name in ((1, "int_mm"), (1024, "int_mm"), (2560, "reference"), (9999, "reference")):
        assert dispatch.choose("int8_linear", (tokens, 48, 256), CPU).name == name
    assert [choices.rounded(n) for n in (0, 1, 512, 513, 4600)] == [512, 512, 512, 1024, 4608]


def test_what_was_not_measured_takes_the_order_and_says_so_once(caplog):
    dispatch._log_unmeasured.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert dispatch.choose("int8_linear", (5, 48, 256), CPU).name == "int_mm"
    assert [record.getMessage() for record in caplog.records] == [
        "cpu: some int8 layers were not measured at load; auto takes the first of int_mm, "
        "reference there"
    ]


def test_only_what_is_left_to_auto_is_measured(tmp_path, monkeypatch):
    timed = fake_times(monkeypatch, int_mm=1.0, reference=2.0, w8a8=1.0, dense=2.0)
    layers = [INT8, Q4_K, Layer("Q8_0", 48, 256), Layer("Q4_K", 48, 64)]
    kinds = {
        LinearOptions(backend="int_mm"): set(),
        LinearOptions(gguf_compute="dense"): {"int8"},
        LinearOptions(gguf_compute="w8a8"): {"int8"},
        LinearOptions(): {"int8", "gguf"},
    }
    for options, expected in kinds.items():
        choices._TABLES.pop(CPU, None)
        timed.clear()
        tune(layers, CPU, torch.float32, Measure(tmp_path / str(hash(options))), options=options)
        names = {"int8" if "int_mm" in candidates else "gguf" for candidates in timed}
        assert names == expected
    # in the last case: INT8 and the rotated product behind Q4_K; five token counts of Q4_K
    assert len(choices.table(CPU)) == 2 + 5


def test_fewer_tokens_are_not_tried_where_decoding_has_won(tmp_path, monkeypatch):
    fake_times(monkeypatch, int_mm=1.0, reference=2.0, w8a8=2.0, dense=1.0)
    for _ in range(2):
        table = tune([Q4_K], CPU, torch.float32, Measure(tmp_path))
        assert [m.key.tokens for m in table if m.key.op == GGUF] == [2048]
    assert table.few_tokens("Q4_K", 48, 256, "float32") == ALWAYS_DENSE


@pytest.mark.parametrize(
    ("w8a8_wins_from", "few"), [(64, 64), (128, 128), (512, 512), (None, ALWAYS_DENSE)]
)
def test_few_tokens_are_where_int8_starts_to_win(w8a8_wins_from, few):
    measured = [
        Measurement(
            Key(GGUF, 48, 256, tokens, "float32", "Q4_K"),
            {"w8a8": 1.0 if w8a8_wins_from and tokens >= w8a8_wins_from else 3.0, "dense": 2.0},
        )
        for tokens in (64, 128, 512)
    ]
    choices.remember(CPU, Table(measured))
    assert choices.table(CPU).few_tokens("Q4_K", 48, 256, "float32") == few
    assert choices.table(CPU).few_tokens("Q4_K", 48, 256, "bfloat16") is None
    packed = blocks.quantize(randn(48, 256, seed=1), "Q4_K")
    for tokens in (FEW_TOKENS, 200, 600):
        x = randn(tokens, 256)
        chosen = "w8a8" if tokens >= few else "dense"
        want = gguf_linear(x, packed, "Q4_K", (48, 256), compute=chosen)
        assert torch.equal(gguf_linear(x, packed, "Q4_K", (48, 256)), want)


def test_bounds_of_time_and_memory_hold(tmp_path, caplog):
    for bound in (Measure(tmp_path, seconds=0), Measure(tmp_path, memory=1000)):
        with caplog.at_level(logging.INFO):
            assert len(tune([INT8], CPU, torch.float32, bound)) == 0
        assert "1 measurements did not fit" in caplog.messages[-1]
    assert not list(tmp_path.iterdir())


def test_a_slow_candidate_ends_with_the_time_of_the_load(tmp_path, monkeypatch):
    assert (Measure().seconds, Measure().memory) == (10, 300_000_000)
    calls = []

    def slow(*args, **kwargs):
        calls.append(time.sleep(0.05))
        return int8_linear(*args, **kwargs)

    monkeypatch.setattr(tuning_jobs, "int8_linear", slow)
    layers = [Layer("int8", 48, k) for k in (64, 128, 256, 512)]
    table = tune(layers, CPU, torch.float32, Measure(tmp_path, seconds=0.3))
    # asked before each run, so a run may cross the bound; 4 layers would take 40 runs
    assert len(calls) <= 6
    assert len(table) <= 1


def test_a_measurement_takes_no_more_memory_than_it_says():
    layers = [Layer("int8", 1024, 1024, 256), Layer("Q4_K", 1024, 1024)]
    arguments = (CPU, torch.float32, LinearOptions(), None, autotune.MEMORY)
    found = list(tuning_jobs.jobs(layers, *arguments))
    assert [job.key.op for job in found] == [LINEAR] + [GGUF] * 5
    for job in (found[0], found[1], found[-1]):
        peaks = [_peak(lambda j=job, n=name: j.make(j.key.tokens)[n]()) for name in job.candidates]
        assert 0.3 * job.nbytes < max(peaks) <= job.nbytes, job.key


def _peak(run) -> int:
    """The most bytes that tensors made by ``run`` hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes))


def test_every_layer_of_the_model_fits_the_memory_of_a_gpu(monkeypatch):
    """By shapes alone: what does not fit whole is timed on a part of its output channels."""
    monkeypatch.setattr(dispatch, "candidates", lambda op, device: ("triton", "int_mm"))
    shapes = [(13824, 4608), (12288, 4608), (4608, 12288), (4608, 4608)]
    layers = [Layer(kind, *shape) for kind in ("int8", "Q4_K") for shape in shapes]
    arguments = (torch.device("cuda"), torch.bfloat16, LinearOptions(), None, autotune.MEMORY)
    found = list(tuning_jobs.jobs(layers, *arguments))
    assert all(job.nbytes <= autotune.MEMORY for job in found)
    assert all(1 <= job.scale <= 4 for job in found)
    assert {job.key.tokens for job in found if job.key.op == LINEAR} == {512, 1536, 4608}


def test_nothing_is_measured_under_compile(tmp_path, monkeypatch):
    timed = fake_times(monkeypatch, int_mm=1.0, reference=2.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert not timed


def test_no_step_can_measure():
    """What a step imports does not hold the code that measures."""
    code = (
        "import sys\n"
        "from ideogram4_quant.ops import attention, fused, layouts, linear, prequantized\n"
        "held = {'autotune', 'tuning_jobs', 'timing'} & {m.split('.')[-1] for m in sys.modules}\n"
        "sys.exit(', '.join(held) or 0)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_measuring_leaves_the_users_seed_alone(tmp_path):
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert torch.equal(torch.rand(4), want)


def test_a_candidate_that_fails_is_left_to_the_order(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(tuning_jobs, "int8_linear", broken)
    assert len(tune([INT8], CPU, torch.float32, Measure(tmp_path))) == 0
    assert "cannot measure int8 linear 256 -> 48" in caplog.text
    assert int8_linear(randn(2, 8), *reference.quantize_rows(randn(3, 8))).shape == (2, 3)
