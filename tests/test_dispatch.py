"""Backends: what is there, why not, and which one runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from ideogram4_quant.errors import BackendUnavailableError
from ideogram4_quant.ops import (
    adapters,
    dispatch,
    reference,
)
from ideogram4_quant.ops.linear import int8_linear
from ideogram4_quant.tests.linear_cases import CPU
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

Q, S, X = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4), torch.ones(2, 64)


@pytest.mark.parametrize("name", ["comfy_kitchen", "triton"])
def test_an_absent_backend_says_why(name):
    report = next(r for r in dispatch.reports("cpu") if r.name == name)
    if report.available:
        pytest.skip(f"{name} runs here: {report.reason}")
    with pytest.raises(BackendUnavailableError, match=r"Use 'auto', or one of \["):
        int8_linear(X, Q, S, backend=name)
    assert len(report.reason) > 10


def test_reports_cover_every_backend_on_every_device():
    for device in ("cpu", "cuda", "meta"):
        names = [report.name for report in dispatch.reports(device)]
        assert sorted(names) == ["comfy_kitchen", "int_mm", "reference", "triton"]
    if not torch.cuda.is_available():
        assert all("no CUDA device" in r.reason for r in dispatch.reports("cuda"))


def test_int_mm_is_refused_where_it_is_not_exact(monkeypatch):
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b).clamp(max=2**15))
    backend, reason = dispatch._probe_int_mm.__wrapped__(CPU)
    assert backend is None
    assert "not exact" in reason
    monkeypatch.delattr(torch, "_int_mm")
    backend, reason = dispatch._probe_int_mm.__wrapped__(CPU)
    assert backend is None
    assert "_int_mm" in reason


def _saturating(q, weight):
    """oneDNN's product on a processor without VNNI: q + 128 as uint8, pairs summed in 16 bits."""
    pairs = (q.int() + 128)[:, :, None] * weight.int()[None]  # [M, K, N]
    pairs = pairs[:, ::2] + pairs[:, 1::2]
    return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int() - 128 * weight.int().sum(0)


def test_int_mm_is_refused_where_pairs_of_products_saturate(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", _saturating)
    backend, reason = dispatch._probe_int_mm.__wrapped__(CPU)
    assert backend is None
    assert "not exact" in reason


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE", "ALL"])
def test_int_mm_is_there_only_where_the_largest_products_are_exact(instructions):
    """oneDNN told to leave newer instructions alone computes as an older processor does."""
    code = (
        "import torch\n"
        "from ideogram4_quant.ops import dispatch\n"
        "q = torch.randint(-127, 128, (40, 512), dtype=torch.int8)\n"
        "w = torch.randint(-128, 128, (24, 512), dtype=torch.int8)\n"
        "q[0], q[1], w[0], w[1] = 127, -127, 127, -128\n"
        "exact = torch.equal(torch._int_mm(q, w.t()).long(), q.long() @ w.long().t())\n"
        "there = dispatch._probe_int_mm(torch.device('cpu'))[0] is not None\n"
        "assert exact or not there, (exact, there)\n"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_auto_falls_back_in_order_and_warns_once(monkeypatch, caplog):
    dispatch._warn_slow.cache_clear()
    probes = {**dispatch._PROBES, "int_mm": lambda device: (None, "switched off")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.choose("int8_gemm", (1, 2, 3), CPU).name == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "int8 layers run as torch formulas on cpu, slowly (int_mm: switched off)"
    ]
    caplog.clear()
    assert dispatch.choose("swiglu_quantize_rows", (1, 2, 3), CPU).name == "reference"
    assert not caplog.records


def test_policy_prefers_what_has_the_op(monkeypatch):
    def fake(name, *ops):
        return lambda device: (dispatch.Backend(name, dict.fromkeys(ops, print)), "fake")

    probes = {
        "comfy_kitchen": fake("comfy_kitchen", "int8_linear"),
        "triton": fake("triton", "int8_gemm", "smooth_rotate_quantize_rows"),
        "int_mm": fake("int_mm", "int8_gemm"),
        "reference": dispatch._probe_reference,
    }
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    monkeypatch.setattr(dispatch, "_ORDER", {"cpu": dispatch._ORDER["cuda"]})
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    monkeypatch.setattr(registry, "is_available", lambda name: True)
    shape = (32, 8, 8)
    assert dispatch.choose("int8_linear", shape, CPU).name == "comfy_kitchen"
    assert dispatch.choose("int8_gemm", shape, CPU).name == "triton"
    assert dispatch.choose("gate_residual_rmsnorm", shape, CPU).name == "reference"
    assert dispatch.choose("int8_linear", shape, CPU, "int_mm").name == "int_mm"
    monkeypatch.setattr(registry, "is_available", lambda name: False)
    assert dispatch.choose("int8_linear", shape, CPU).name == "triton"
    with pytest.raises(BackendUnavailableError, match="switched off"):
        dispatch.choose("int8_linear", shape, CPU, "comfy_kitchen")


def test_the_comfy_kitchen_adapter_computes_the_same(monkeypatch):
    """Its CUDA kernels are not here; their eager twin takes the same arguments."""
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    monkeypatch.setattr(
        registry, "get_implementation", lambda op, backend, kwargs: eager.int8_linear
    )
    x, smooth = randn(5, 256), torch.linspace(0.5, 2, 256)
    w = randn(8, 256, seed=1)
    for options in ({}, {"rotation": 64}, {"smooth": smooth, "rotation": 256}):
        q, scale = reference.smooth_rotate_quantize_rows(
            w * options.get("smooth", 1), None, options.get("rotation")
        )
        got = adapters.comfy_kitchen_linear(x, q, scale, randn(8), **options)
        assert relative(got, reference.int8_linear(x, q, scale, randn(8), **options)) < 2e-3


def test_a_probe_that_memory_failed_is_asked_again_and_one_that_cannot_is_not(monkeypatch):
    real, calls = torch._int_mm, []

    def failing(reason):
        def product(*arguments):
            calls.append(reason)
            raise RuntimeError(reason)

        return product

    dispatch._probe_int_mm.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", failing("CUDA error: out of memory"))
        assert dispatch._probe_int_mm(CPU)[0] is None
        monkeypatch.setattr(torch, "_int_mm", real)
        assert dispatch._probe_int_mm(CPU)[0] is not None
        dispatch._probe_int_mm.cache_clear()
        calls.clear()
        monkeypatch.setattr(torch, "_int_mm", failing("not implemented for 'Int'"))
        assert [dispatch._probe_int_mm(CPU)[0] for _ in range(3)] == [None] * 3
        assert len(calls) == 1
    finally:
        dispatch._probe_int_mm.cache_clear()
