"""Measured choices of fused blocks, beside a backend whose linear quantizes inside."""

from __future__ import annotations

import math

import pytest
import torch

from ideogram4_quant.ops import dispatch, fused, reference
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.ops.tuning import autotune, choices, tuning_jobs
from ideogram4_quant.ops.tuning.autotune import Layer, Measure, layers_of, tune
from ideogram4_quant.ops.tuning.choices import FUSED, Key, Measurement, Table
from ideogram4_quant.tests.fused_block import Block
from ideogram4_quant.tests.linear_cases import CPU
from ideogram4_quant.tests.tensors import randn, relative
from ideogram4_quant.tests.tuning_cases import fake_times

pytestmark = pytest.mark.usefixtures("nothing_measured")


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
    choices._TABLES.pop(CPU, None)
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
    choices._TABLES.pop(CPU, None)
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
