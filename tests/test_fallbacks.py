"""What runs where something is missing: each case of the documented order, forced."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.linear import default_dtype
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.ops import adapters, blocks, dispatch, kernels, reference
from ideogram4_quant.ops.dispatch import Backend
from ideogram4_quant.ops.gguf_compute import compute_here
from ideogram4_quant.ops.linear import LinearOptions, gguf_linear, int8_linear
from ideogram4_quant.ops.tuning import choices
from ideogram4_quant.quant import quantize_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (64, 48, 256)
KITCHEN = Backend("comfy_kitchen", {"int8_linear": print})
TRITON = Backend("triton", dict.fromkeys(dispatch.REFERENCE_OPS, print))
INT_MM = Backend("int_mm", {"int8_gemm": adapters.int_mm_gemm})

# device, what is there -> who runs the whole layer, a product alone, a quantizer, GGUF at 4 bits
CASES = {
    "NVIDIA": ("cuda", (KITCHEN, TRITON, INT_MM), "comfy_kitchen", "triton", "triton", "w8a8"),
    "NVIDIA, comfy-kitchen's CUDA off": (
        "cuda",
        (TRITON, INT_MM),
        "triton",
        "triton",
        "triton",
        "w8a8",
    ),
    "Windows without Triton, or sm_75": (
        "cuda",
        (KITCHEN, INT_MM),
        "comfy_kitchen",
        "int_mm",
        "reference",
        "w8a8",
    ),
    "torch alone": ("cuda", (INT_MM,), "int_mm", "int_mm", "reference", "w8a8"),
    "ROCm without int8": ("cuda", (), "reference", "reference", "reference", "dense"),
    "ROCm, comfy-kitchen": (
        "cuda",
        (KITCHEN,),
        "comfy_kitchen",
        "reference",
        "reference",
        "dense",
    ),
    "XPU with int_mm": ("xpu", (INT_MM,), "int_mm", "int_mm", "reference", "w8a8"),
    "XPU": ("xpu", (), "reference", "reference", "reference", "dense"),
    "MPS": ("mps", (), "reference", "reference", "reference", "dense"),
    "CPU": ("cpu", (INT_MM,), "int_mm", "int_mm", "reference", "w8a8"),
    "CPU that saturates": ("cpu", (), "reference", "reference", "reference", "dense"),
}


@pytest.fixture
def only(monkeypatch):
    """Make just these backends available, on any device."""

    def force(*there):
        found = {backend.name: backend for backend in there}
        probes = {
            name: lambda device, n=name: (found.get(n), "there" if n in found else "missing")
            for name in ("triton", "comfy_kitchen", "int_mm")
        }
        probes["reference"] = dispatch._probe_reference
        monkeypatch.setattr(dispatch, "_PROBES", probes)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        registry = pytest.importorskip("comfy_kitchen.registry").registry
        monkeypatch.setattr(registry, "is_available", lambda name: True)

    dispatch._warn_slow.cache_clear()
    choices._TABLES.pop(CPU, None)
    return force


@pytest.mark.parametrize("case", CASES)
def test_the_documented_order(case, only, caplog):
    kind, there, whole, product, quantizer, gguf = CASES[case]
    device = torch.device(kind, 0)
    only(*there)
    chosen = [
        dispatch.choose(op, SHAPE, device).name
        for op in ("int8_linear", "int8_gemm", "smooth_rotate_quantize_rows")
    ]
    assert chosen == [whole, product, quantizer]
    here = ((64, 48, 256), device, torch.float32, "auto")
    assert compute_here("auto", "Q4_K", *here) == gguf
    assert compute_here("auto", "Q8_0", *here) == "dense"
    assert compute_here("w8a8", "Q4_K", *here) == "w8a8"
    slow = "run as torch formulas" in caplog.text
    assert slow == ("reference" in (whole, product))
    if slow:
        assert "missing" in caplog.text


@pytest.mark.parametrize("case", [c for c, row in CASES.items() if row[0] == "cpu"])
def test_layers_and_gguf_weights_run_on_what_is_there(case, only):
    """On the CPU the choice is not only named but computed: int8 alike, GGUF dense without int8."""
    _, there, _, _, _, gguf = CASES[case]
    only(*there)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator) for n in SHAPE[:2])
    q, scale = reference.quantize_rows(weight)
    assert torch.equal(int8_linear(x, q, scale), reference.int8_linear(x, q, scale))
    packed = blocks.quantize(weight, "Q4_K")
    want = gguf_linear(x, packed, "Q4_K", (48, 256), compute=gguf)
    assert torch.equal(gguf_linear(x, packed, "Q4_K", (48, 256)), want)


# ---- why Triton is not there, and what to do


def triton_on(monkeypatch, capability=(8, 6), hip=None, system="posix"):
    """``kernels.available`` of a pretended CUDA or ROCm device."""
    monkeypatch.setattr(kernels, "os", SimpleNamespace(name=system, environ={}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    return kernels._available.__wrapped__(CUDA)


def failing_probe(device):
    return "RuntimeError: no C compiler"


@pytest.mark.parametrize(
    ("system", "package"), [("nt", "pip install triton-windows"), ("posix", "pip install triton")]
)
def test_without_triton_the_log_says_what_to_install_once(monkeypatch, caplog, system, package):
    monkeypatch.setitem(sys.modules, "triton", None)
    ready, reason = triton_on(monkeypatch, system=system)
    assert not ready
    assert reason.endswith(package)
    monkeypatch.setattr(kernels, "available", lambda device: (ready, reason))
    dispatch._probe_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert dispatch._probe_triton(CUDA) == (None, reason)
        assert [r.getMessage().endswith(package) for r in caplog.records] == [True]
    finally:
        dispatch._probe_triton.cache_clear()


def test_what_keeps_triton_off_is_named(monkeypatch):
    pytest.importorskip("triton")
    assert "sm_75" in triton_on(monkeypatch, capability=(7, 5))[1]
    assert "ROCm" in triton_on(monkeypatch, hip="6.4")[1]
    monkeypatch.setattr(kernels, "_probe", failing_probe)
    plain, windows = (triton_on(monkeypatch, system=name)[1] for name in ("posix", "nt"))
    assert "no C compiler" in plain
    assert "embedded" not in plain
    assert windows.startswith(plain)
    assert "include and libs" in windows


def test_comfy_kitchen_is_asked_for_the_kernels_of_the_card(monkeypatch):
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    monkeypatch.setattr(registry, "is_available", lambda name: name == "hip")
    capable = {"hip": {"capabilities": ["int8_linear"]}}
    monkeypatch.setattr(registry, "list_backends", lambda: capable)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    asked = []

    def implementation(op, name, arguments=None):
        asked.append(name)
        return lambda **given: given["x"]

    monkeypatch.setattr(registry, "get_implementation", implementation)
    backend, reason = dispatch._probe_comfy_kitchen.__wrapped__(CUDA)
    assert backend.has("int8_linear")
    assert reason == "ROCm"
    asked.clear()
    backend.get("int8_linear")(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2))
    monkeypatch.setattr(torch.version, "hip", None)
    backend.get("int8_linear")(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2))
    assert asked == ["hip", "cuda"]
    unavailable, reason = dispatch._probe_comfy_kitchen.__wrapped__(CUDA)
    assert unavailable is None
    assert "CUDA" in reason


# ---- cards without bf16


@pytest.mark.parametrize(
    ("capability", "hip", "dtype"),
    [
        ((7, 5), None, torch.float32),
        ((8, 6), None, torch.bfloat16),
        ((9, 0), "6.4", torch.bfloat16),
    ],
)
def test_cards_without_bf16_compute_in_fp32(monkeypatch, capability, hip, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert default_dtype(CUDA) == dtype
    assert default_dtype(CUDA, torch.float32) == torch.float32
    assert default_dtype(CPU) == torch.float32


@torch.no_grad()
def test_int8_products_carry_an_fp32_residual(tiny, tmp_path, monkeypatch):
    """What such a card runs: activations and residual in fp32, every quantized layer in int8."""
    file = tmp_path / "int8.safetensors"
    quantize_checkpoint(tiny.conditional_file, "INT8 W8A8", file, copy="conditional")
    options = LinearOptions(backend="int_mm")
    model = load_transformer(open_checkpoint(file), device="cpu", options=options)
    seen, products = [], []
    for block in model.layers:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: products.append(a.shape) or real(a, b))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, model.config.llm_features_dim, generator=generator)
    latents = torch.randn(1, 8, model.config.in_channels, generator=generator)
    out = velocity(model, latents, 0.3, prepare(model, 2, 4, features))
    assert len(products) >= 5 * len(model.layers)
    assert {hidden.dtype for hidden in seen} == {torch.float32}
    # the residual holds what bf16 could not
    assert all(not torch.equal(h, h.bfloat16().float()) for h in seen)
    assert out.isfinite().all()
