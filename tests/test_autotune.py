"""Measured choices: what is timed, kept, read again and obeyed; the times themselves are faked."""

from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ideogram4_quant.ops import (
    autotune,
    blocks,
    choice_files,
    choices,
    dispatch,
    fused,
    reference,
    tuning_jobs,
)
from ideogram4_quant.ops.autotune import Layer, Measure, layers_of, tune
from ideogram4_quant.ops.choices import (
    ALWAYS_DENSE,
    FUSED,
    GGUF,
    LINEAR,
    Key,
    Measurement,
    Table,
)
from ideogram4_quant.ops.gguf_compute import FEW_TOKENS
from ideogram4_quant.ops.layouts import QuantizedTensor
from ideogram4_quant.ops.linear import LinearOptions, gguf_linear, int8_linear
from ideogram4_quant.tests.fused_block import Block, relative

CPU = torch.device("cpu")
INT8 = Layer("int8", 48, 256)
Q4_K = Layer("Q4_K", 48, 256)


@pytest.fixture(autouse=True)
def _nothing_known():
    choices.forget(CPU)
    yield
    choices.forget(CPU)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake_times(monkeypatch, **seconds):
    """Every candidate takes what is given for it; returns the candidates that were timed."""
    timed = []

    def medians(functions, device, rounds=5, deadline=None, *, prune=False):
        for function in functions.values():
            function()
        timed.append(tuple(functions))
        return {name: seconds[name] for name in functions}

    monkeypatch.setattr(autotune, "medians", medians)
    return timed


def linear_key(layer, tokens=512, dtype="float32"):
    return Key(LINEAR, layer.n, layer.k, tokens, dtype, str(layer.rotation))


# ---- what is measured


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
        choices.forget(CPU)
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


# ---- fused blocks, beside a backend whose linear quantizes inside


@pytest.fixture
def whole(monkeypatch):
    """A stand-in for comfy-kitchen's kernel, first in the order of the CPU; counts its calls."""
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    monkeypatch.setattr(registry, "is_available", lambda name: True)
    calls = []

    def linear_of(*args, **kwargs):
        calls.append(args[1].shape)
        return reference.int8_linear(*args, **kwargs)

    backend = dispatch.Backend("comfy_kitchen", {"int8_linear": linear_of})
    probes = {**dispatch._PROBES, "comfy_kitchen": lambda device: (backend, "fake")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    monkeypatch.setattr(dispatch, "_ORDER", {"cpu": ("comfy_kitchen", "int_mm")})
    return calls


def fused_layers():
    block = Block(options=LinearOptions())
    names = {name: f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
    names |= {name: f"layers.0.attention.{name}.weight" for name in ("qkv", "o")}
    return block, {names[name]: weight for name, weight in block.weights.items()}


def test_the_inputs_of_a_block_are_known_by_name():
    _, state = fused_layers()
    assert tuning_jobs.inputs_of(state) == (
        ("normed", Layer("int8", 768, 256, 256)),
        ("normed for two", Layer("int8", 768, 256, 256)),
        ("gated", Layer("int8", 256, 768, 256)),
    )
    assert tuning_jobs.inputs_of({"layers.0.attention.o.weight": randn(4, 4)}) == ()


@pytest.mark.parametrize("rows", [1e-3, 3e-3], ids=["rows", "values"])
def test_a_fused_block_runs_what_was_faster_as_a_whole(rows, whole, tmp_path, monkeypatch):
    """comfy-kitchen's linear may win over rows and the best product that takes them."""
    block, state = fused_layers()
    inputs = block.inputs(1, 37)
    want = block.unfused(*inputs)
    timed = fake_times(monkeypatch, comfy_kitchen=1.0, int_mm=2.0, rows=rows, values=2e-3)
    arguments = (layers_of(state.values()), CPU, torch.float32, Measure(tmp_path))
    table = tune(*arguments, inputs=tuning_jobs.inputs_of(state))
    assert timed.count(("rows", "values")) == 2 * 3  # on a CPU a few tokens before the many
    assert sum(m.key.op == FUSED for m in table) == 3
    assert "fused int8 linear 768 -> 256, 512 tokens, float32, gated, rotated by 256: " in "".join(
        autotune.describe(CPU)
    )
    whole.clear()
    assert relative(block.fused(*inputs), want) < 1e-3
    o_alone, all_five = [(256, 256)], [(768, 256), (256, 256), (768, 256), (768, 256), (256, 768)]
    assert whole == (o_alone if rows < 2e-3 else all_five)
    # an explicit backend is obeyed, and compiled blocks choose the same
    if rows > 2e-3:
        torch._dynamo.reset()
        compiled = torch.compile(block.fused, fullgraph=True, backend="aot_eager")
        whole.clear()
        assert relative(compiled(*inputs), want) < 1e-3
        assert whole == all_five
    # a second start measures nothing again
    choices.forget(CPU)
    timed.clear()
    tune(*arguments, inputs=tuning_jobs.inputs_of(state))
    assert timed == []


def test_rows_are_measured_only_against_a_linear_that_cannot_be_split(whole, tmp_path, monkeypatch):
    _, state = fused_layers()
    timed = fake_times(monkeypatch, comfy_kitchen=2.0, int_mm=1.0, rows=1.0, values=2.0)
    arguments = (layers_of(state.values()), CPU, torch.float32)
    inputs = tuning_jobs.inputs_of(state)
    tune(*arguments, Measure(tmp_path), inputs=inputs)
    assert ("rows", "values") not in timed
    # nor where they do not fit the memory
    choices.forget(CPU)
    kept = Measure(tmp_path / "small", memory=3_500_000)
    fake_times(monkeypatch, comfy_kitchen=1.0, int_mm=2.0, rows=1.0, values=2.0)
    assert not any(m.key.op == FUSED for m in tune(*arguments, kept, inputs=inputs))


def test_the_nearest_count_says_whether_rows_pay():
    times = {512: (1.0, 2.0), 1536: (2.0, 1.0), 4608: (1.0, 2.0)}
    measured = [
        Measurement(Key(FUSED, 48, 256, tokens, "float32", "gated"), {"rows": r, "values": v})
        for tokens, (r, v) in times.items()
    ]
    choices.remember(CPU, Table(measured))
    for tokens in (1, 512, 513, 2560, 2561, 9999):
        nearest = min(times, key=lambda t: abs(math.log(t / choices.rounded(tokens))))
        h = fused.Gated(randn(tokens, 256), randn(tokens, 256))
        assert h.rows_pay(48, None, None) == (times[nearest][0] == 1.0), tokens
        assert h.rows_pay(48, torch.ones(256), None)  # values know no smoothing
        assert h.rows_pay(48, None, 256)  # not measured
        assert h.rows_pay(49, None, None)


# ---- files


def test_a_second_start_reads_the_file(tmp_path, monkeypatch):
    timed = fake_times(monkeypatch, int_mm=2e-3, reference=1e-3)
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    choices.forget(CPU)
    before = len(timed)
    table = tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert len(timed) == before
    assert table.get(linear_key(INT8)).seconds == {"int_mm": 2e-3, "reference": 1e-3}
    # another shape joins what is there
    tune([Layer("int8", 16, 64)], CPU, torch.float32, Measure(tmp_path))
    assert len(choice_files.load(tmp_path, CPU)) == 2
    # a candidate that was not there then is measured now
    monkeypatch.setattr(dispatch, "candidates", lambda op, device: ("int_mm", "reference", "new"))
    job = next(iter(tuning_jobs.jobs([INT8], CPU, torch.float32, LinearOptions(), None, 10**9)))
    assert not job.is_settled(table)


def test_versions_and_devices_have_files_of_their_own(tmp_path, monkeypatch):
    first = choice_files.file_for(tmp_path, CPU)
    assert first.parent == tmp_path
    about = choice_files.environment(CPU)
    assert {"device", "torch", "triton", "comfy_kitchen", "threads"} <= set(about)
    for name in about:
        changed = {**about, name: about[name] + " x"}
        monkeypatch.setattr(choice_files, "environment", lambda device, c=changed: c)
        assert choice_files.file_for(tmp_path, CPU) != first


def _saved(folder):
    measured = Measurement(linear_key(INT8), {"int_mm": 1.0, "reference": 2.0}, {"int_mm": 0.0})
    choice_files.save(folder, CPU, Table([measured]))
    return choice_files.file_for(folder, CPU)


BROKEN = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no json": lambda text: "\0" * 50,
    "a list": lambda text: "[]",
    "no measurements": lambda text: "{}",
    "text for a number": lambda text: text.replace('"k": 256', '"k": "256"'),
    "a zero size": lambda text: text.replace('"n": 48', '"n": 0'),
    "a truth value": lambda text: text.replace('"n": 48', '"n": true'),
    "an unknown op": lambda text: text.replace('"int8_linear"', '"rm -rf"'),
    "no times": lambda text: text.replace('"int_mm": 1.0', '"int_mm": NaN'),
    "a time of zero": lambda text: text.replace('"int_mm": 1.0', '"int_mm": 0'),
    "times as a list": lambda text: json.dumps(
        {"measurements": [{**json.loads(text)["measurements"][0], "seconds": [1]}]}
    ),
    "deep": lambda text: "[" * 100_000,
    "too large": lambda text: text + " " * (1 << 23),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_reported_and_rebuilt(case, tmp_path, caplog):
    path = _saved(tmp_path)
    text = path.read_text()
    assert len(choice_files.load(tmp_path, CPU)) == 1
    broken = BROKEN[case](text)
    assert broken != text
    path.write_text(broken)
    assert len(choice_files.load(tmp_path, CPU)) == 0
    assert str(path) in caplog.text
    assert "measuring again" in caplog.text
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert len(choice_files.load(tmp_path, CPU)) == 1


def test_unknown_names_in_a_file_choose_nothing(tmp_path):
    times = {"reference": 2.0, "os.system": 1.0}
    choices.remember(CPU, Table([Measurement(linear_key(INT8), times)]))
    assert dispatch.choose("int8_linear", (5, 48, 256), CPU).name == "reference"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tune([INT8], CPU, torch.float32, Measure(tmp_path / "file"))
    assert "the measured choices are not kept" in caplog.text
    assert len(choices.table(CPU)) == 1


_WRITER = """
import sys
from pathlib import Path
import torch
from ideogram4_quant.ops import choice_files
from ideogram4_quant.ops.choices import LINEAR, Key, Measurement, Table
folder, name = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
cpu = torch.device("cpu")
for count in range(1, 40):
    key = Key(LINEAR, name, count, 512, "float32", "0")
    choice_files.save(folder, cpu, Table([Measurement(key, {"int_mm": 1.0})]))
    assert len(choice_files.load(folder, cpu)), "half a file was seen"
"""


def test_two_processes_at_once_leave_a_whole_file(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "error", "-c", _WRITER, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(n)], cwd=root, stderr=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "cannot be read" not in errors
        assert "not kept" not in errors
    entries = json.loads(next(tmp_path.iterdir()).read_text())["measurements"]
    assert len(list(tmp_path.iterdir())) == 1
    assert {entry["n"] for entry in entries} & {1, 2}


def test_the_users_folder_is_the_systems(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert choice_files.user_folder() == tmp_path / "ideogram4_quant"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert choice_files.user_folder().parts[-3:] == ("Library", "Caches", "ideogram4_quant")
