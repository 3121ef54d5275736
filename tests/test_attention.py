"""The chooser of attention: what runs, what is refused, what is measured."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.errors import BackendUnavailableError, OpError
from ideogram4_quant.ops import attention
from ideogram4_quant.ops.tuning import autotune, choices
from ideogram4_quant.tests.tensors import randn

CPU = torch.device("cpu")


@pytest.fixture
def int8_here(monkeypatch):
    """A stand-in for comfy-kitchen's kernel: less exact, and it counts its calls."""
    calls = []

    def kernel(q, k, v):
        calls.append(q.shape)
        return attention.BACKENDS["sdpa"](*(t.bfloat16() for t in (q, k, v))).to(q.dtype)

    monkeypatch.setattr(attention, "_int8_missing", lambda device: None)
    monkeypatch.setattr(attention, "BACKENDS", {**attention.BACKENDS, "int8": kernel})
    return calls


def test_attention_equals_its_formula_with_and_without_a_mask():
    q, k, v = (randn(2, 3, 40, 64, seed=seed) for seed in range(3))
    for mask in (None, randn(1, 1, 40, 40) > 0, randn(2, 1, 40, 40)):
        got = attention.attention(q, k, v, mask)
        assert torch.allclose(got.double(), attention.reference(q, k, v, mask), atol=1e-5)


def test_a_mask_never_reaches_the_int8_kernel_and_is_said_once(int8_here, caplog):
    attention.log_masked.cache_clear()
    q, k, v = (randn(1, 2, 40, 64, seed=seed) for seed in range(3))
    mask = randn(1, 1, 40, 40) > 0
    for _ in range(2):
        got = attention.attention(q, k, v, mask, backend="int8")
    assert not int8_here
    assert torch.equal(got, attention.attention(q, k, v, mask))
    assert caplog.text.count("runs with a mask") == 1
    attention.attention(q, k, v, backend="int8")
    assert int8_here == [(1, 2, 40, 64)]


def test_auto_takes_the_faster_one_measured_and_sdpa_where_nothing_was(int8_here):
    q, k, v = (randn(1, 2, 40, 64, seed=seed) for seed in range(3))
    try:
        attention.attention(q, k, v, backend="auto")
        assert not int8_here
        key = choices.Key(choices.ATTENTION, 2, 64, 4608, "float32")
        for times, calls in (({"sdpa": 2.0, "int8": 1.0}, 1), ({"sdpa": 1.0, "int8": 2.0}, 1)):
            choices.remember(CPU, choices.Table([choices.Measurement(key, times)]))
            attention.attention(q, k, v, backend="auto")
            assert len(int8_here) == calls
    finally:
        choices._TABLES.pop(CPU, None)


def test_attention_is_measured_with_its_error_where_auto_was_asked(int8_here, tmp_path):
    try:
        measure = autotune.Measure(tmp_path)
        table = autotune.tune([], CPU, torch.float32, measure, heads=(2, 64))
        (found,) = list(table)
        assert set(found.seconds) == set(found.errors) == {"sdpa", "int8"}
        assert found.errors["sdpa"] < 1e-5 < found.errors["int8"] < 1e-2
        assert "relative error: " in autotune.describe(CPU)[0]
        assert list(autotune.tune([], CPU, torch.float32, measure)) == [found]
    finally:
        choices._TABLES.pop(CPU, None)


def test_gradients_take_sdpa(int8_here):
    q, k, v = (randn(1, 2, 8, 64, seed=seed).requires_grad_() for seed in range(3))
    attention.attention(q, k, v, backend="int8").sum().backward()
    assert not int8_here
    assert q.grad.isfinite().all()


def test_attention_compiles_without_graph_breaks():
    q, k, v = (randn(1, 2, 40, 64, seed=seed) for seed in range(3))
    run = torch.compile(
        lambda a, b, c: attention.attention(a, b, c, backend="auto") * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(run(q, k, v), attention.attention(q, k, v) * 2)


Q = torch.zeros(1, 2, 8, 64)
BAD = {
    "dimensions": (lambda: attention.attention(Q[0], Q, Q), r"q \(2, 8, 64\)"),
    "heads": (lambda: attention.attention(Q, Q[:, :1], Q[:, :1]), r"k \(1, 1, 8, 64\)"),
    "head size": (lambda: attention.attention(Q, Q[..., :32], Q[..., :32]), "32"),
    "dtype": (lambda: attention.attention(Q, Q.half(), Q), "torch.float16"),
    "integers": (lambda: attention.attention(Q.int(), Q.int(), Q.int()), "torch.int32"),
    "device": (lambda: attention.attention(Q, Q.to("meta"), Q), "meta"),
    "name": (lambda: attention.attention(Q, Q, Q, backend="flash"), "'flash'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_attention_are_named(case):
    function, message = BAD[case]
    with pytest.raises(OpError, match=message):
        function()


def test_int8_attention_is_refused_with_the_reason_where_it_is_not():
    reports = {report.name: report for report in attention.reports(CPU)}
    assert reports["sdpa"].available
    with pytest.raises(BackendUnavailableError, match="CUDA or ROCm GPU, not cpu"):
        attention.attention(Q, Q, Q, backend="int8")
    with pytest.raises(BackendUnavailableError):
        attention.check("int8", CPU)
    attention.check("auto", CPU)
