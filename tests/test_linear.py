"""Checked linear layers: every backend against the reference, options, errors, torch.compile."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.ops import (
    adapters,
    blocks,
    dispatch,
    fused,
    layouts,
    library,
    prequantized,
    reference,
)
from ideogram4_quant.ops import linear as ops_linear
from ideogram4_quant.ops.errors import BackendUnavailableError, OpError
from ideogram4_quant.ops.gguf_compute import FEW_TOKENS, resolve_compute
from ideogram4_quant.ops.linear import LinearOptions, gguf_linear, int8_linear, linear
from ideogram4_quant.tests.watch import Watch

torch.set_num_threads(1)

CPU = torch.device("cpu")
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1, 1, 1), (1, 16, 64), (3, 63, 100), (17, 5, 255), (33, 40, 2000), (300, 129, 256)]
BACKENDS = [r.name for r in dispatch.reports(CPU) if r.available and r.name != "triton"]
KINDS = {
    "int8": ("Ideogram4QuantInt8", {}),
    "int8 smooth rotated": ("Ideogram4QuantInt8", {"smooth": 1.25, "rotation": 64}),
    "Q8_0": ("Ideogram4QuantGGUF", {"qtype": "Q8_0"}),
    "Q4_K": ("Ideogram4QuantGGUF", {"qtype": "Q4_K"}),
    "fp8": ("Ideogram4QuantFP8", {}),
    "nf4": ("Ideogram4QuantNF4", {}),
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def make(kind, weight):
    layout, options = KINDS[kind]
    if "smooth" in options:
        smooth = torch.linspace(0.5, 2, weight.shape[1]) * options["smooth"]
        options = {**options, "smooth": smooth}
    return QuantizedTensor.from_float(weight, layout, **options)


# ---- int8


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_backend_equals_the_reference(backend, m, n, k, with_bias):
    x = randn(m, k)
    x[:, :: max(1, k // 3)] *= 40
    q, scale = reference.quantize_rows(randn(n, k, seed=1))
    bias = randn(n, seed=2) if with_bias else None
    got = int8_linear(x, q, scale, bias, backend=backend)
    assert torch.equal(got, reference.int8_linear(x, q, scale, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_integer_product_is_exact(backend):
    gemm = dispatch.choose("int8_gemm", (5, 7, 12288), CPU, backend).get("int8_gemm")
    generator = torch.Generator().manual_seed(0)
    for m, n, k in [*SHAPES, (2, 3, 12288)]:
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        q[0], w[0] = -128, -128
        want = q.double() @ w.double().t()
        got = gemm(q, torch.ones(m), w, torch.ones(n), None, torch.float32)
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("group", [None, 16, 64, 256])
def test_int8_linear_equals_comfy_kitchen(dtype, group):
    """With small integers the rotation is exact in any dtype, so only epilogues differ."""
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-8, 9, (13, 768), generator=generator).to(dtype)
    x[:, 5] = 127.0  # scales that a 16-bit type holds exactly, as comfy-kitchen divides in it
    w = torch.randint(-8, 9, (21, 768), generator=generator).float()
    if group is None:
        ck_q, ck_scale = eager.quantize_int8_rowwise(w)
    else:
        ck_q, ck_scale = eager.quantize_int8_convrot_weight(w, group)
        x = reference.rotate(x, group)
        assert torch.equal(x.to(dtype).float(), x.float())
    bias = randn(21).to(dtype)
    want = eager.int8_linear(x, ck_q, ck_scale, bias, dtype, group is not None, group or 256)
    got = int8_linear(x, ck_q, ck_scale, bias, rotation=group)
    eps = EPS[dtype]
    assert ((got - want).abs() <= 2 * eps * (want.abs() + 2 * bias.abs())).all()


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 3, 64), (2, 0, 64)])
def test_shapes_and_dtypes_of_x(dtype, shape):
    x = randn(*shape, dtype=dtype)
    q, scale = reference.quantize_rows(randn(9, 64, seed=1))
    got = int8_linear(x, q, scale, randn(9))
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 9)
    packed = blocks.quantize(randn(9, 64, seed=1), "Q4_0")
    for compute in ("w8a8", "dense"):
        got = gguf_linear(x, packed, "Q4_0", (9, 64), randn(9), compute=compute)
        assert got.dtype == dtype
        assert got.shape == (*shape[:-1], 9)


def test_strided_arguments():
    x, w = randn(64, 2, 5).permute(2, 1, 0), randn(9, 128, seed=1)[:, ::2]
    q, scale = reference.quantize_rows(w)
    strided = torch.empty(64, 9, dtype=torch.int8).t().copy_(q)
    want = int8_linear(x.contiguous(), q, scale)
    assert torch.equal(int8_linear(x, strided, scale[:, None]), want)


def test_rows_that_are_not_finite_and_rows_of_zeros():
    x, w, bias = randn(6, 64), randn(9, 64, seed=1), randn(9, seed=2)
    w[3] = 0
    for kind in ("int8", "int8 smooth rotated", "Q8_0"):
        qt = make(kind, w)
        clean = linear(x, qt, bias)
        assert torch.equal(clean[:, 3], bias[3].expand(6))
        bad = x.clone()
        bad[1, 5], bad[4, 60], bad[2] = float("nan"), float("inf"), 0
        out = linear(bad, qt, bias)
        assert out[1].isnan().all()
        assert not out[4].isfinite().any() or kind == "Q8_0"
        assert torch.equal(out[[0, 3, 5]], clean[[0, 3, 5]])
        assert torch.equal(out[2], bias)


def test_the_weight_is_read_in_place(monkeypatch):
    seen = []
    real = torch._int_mm

    def spy(a, b):
        seen.append((b.data_ptr(), b.stride()))
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", spy)
    qt = make("int8", randn(96, 128))
    part, x, one = qt[32:64], randn(40, 128), torch.ones(128)
    F.linear(x, part)
    linear(fused.Normed(x, one, one, 1e-5), part)
    assert seen == [(qt._qdata[32:].data_ptr(), (1, 128))] * 2


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("options", [(None, 0), (torch.linspace(0.5, 2, 256), 64)], ids=["", "R/s"])
def test_no_call_copies_a_weight_or_waits_for_the_device(backend, options, monkeypatch):
    """Nothing as large as the weight is made anew, whatever the values, on CPU and GPU paths."""
    q, scale = reference.quantize_rows(randn(512, 256))
    x, bias = randn(3, 256), randn(512)
    x[1, 7] = float("nan")
    for multiply in (adapters._int_mm, adapters.padded_int_mm):
        monkeypatch.setattr(adapters, "_int_mm", multiply)
        with Watch() as watch:
            ops_linear._int8_linear(x, q, scale, bias, *options, backend)
            rows = prequantized._normed_rows(x, x[0], x[2], 1e-5, *options, backend)
            prequantized._int8_product(*rows, q, scale, bias, torch.float32, backend)
        assert 0 < watch.largest < q.numel() / 4
    with Watch() as watch:
        q.t().contiguous()
    assert watch.largest == q.numel()
    with pytest.raises(AssertionError, match="waits"), Watch():
        bool((x > 0).any())


def test_comfy_kitchens_kernel_gets_the_weight_itself(monkeypatch):
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    given = {}

    def implementation(op, backend, arguments):
        return lambda **kwargs: given.update(kwargs) or kwargs["x"]

    monkeypatch.setattr(registry, "get_implementation", implementation)
    q, scale = reference.quantize_rows(randn(512, 256))
    with Watch() as watch:
        adapters.comfy_kitchen_linear(randn(3, 256), q[8:16], scale[8:16], rotation=256)
    assert given["weight"].data_ptr() == q[8:].data_ptr()
    assert watch.largest <= 3 * 256


def test_the_epilogue_in_tiles(monkeypatch):
    x = randn(37, 64)
    q, scale = reference.quantize_rows(randn(10, 64, seed=1))
    want = int8_linear(x, q, scale, randn(10, seed=2), backend="int_mm")
    monkeypatch.setattr(adapters, "_TILE", {"cpu": 50})
    assert torch.equal(int8_linear(x, q, scale, randn(10, seed=2), backend="int_mm"), want)


@pytest.mark.parametrize("rotation", [None, 64])
def test_quantizing_in_tiles_changes_nothing(rotation, monkeypatch):
    monkeypatch.setattr(adapters, "_TILE", {"cpu": 300})
    x, up, smooth = randn(2, 7, 128), randn(2, 7, 128, seed=1), torch.linspace(0.5, 2, 128)
    x[0, 3, 5] = float("inf")
    x[1, 2] = 0
    tail = (smooth, rotation)
    for got, want in (
        (
            adapters.quantize_rows_in_tiles(x, *tail),
            reference.smooth_rotate_quantize_rows(x, *tail),
        ),
        (adapters.swiglu_in_tiles(x, up, *tail), reference.swiglu_quantize_rows(x, up, *tail)),
    ):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1].nan_to_num(-1), want[1].nan_to_num(-1))
    empty = adapters.quantize_rows_in_tiles(x[:0], *tail)
    assert empty[0].shape == (0, 128)


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (1, 8, 8), (16, 8, 16)])
def test_padding_for_cublas(m, n, k, caplog):
    """Run on the CPU: what is added for cuBLASLt changes nothing."""
    adapters._warn_padded.cache_clear()
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = adapters.padded_int_mm(q, w)
            assert torch.equal(got, reference.int32_product(q, w))
    assert len(caplog.records) == int(bool(n % 8 or k % 8))


# ---- GGUF


@pytest.mark.parametrize("qtype", list(blocks.FORMATS))
@pytest.mark.parametrize("compute", ["w8a8", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_linear_is_near_the_decoded_weight(qtype, compute, dtype):
    x, bias = randn(5, 512, dtype=dtype), randn(33, seed=2)
    packed = blocks.quantize(randn(33, 512, seed=1), qtype)
    dense = blocks.dequantize(packed, qtype, (33, 512))
    got = gguf_linear(x, packed, qtype, (33, 512), bias, compute=compute)
    want = F.linear(x.float(), dense, bias)
    assert relative(got, want) < {"w8a8": 0.014, "dense": 1e-6}[compute] + EPS[dtype] / 2
    if dtype == torch.float32:
        plain = reference.gguf_linear(x, packed, qtype, (33, 512), bias, compute=compute)
        assert torch.allclose(got, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("qtype", "k", "want"),
    [
        ("Q4_K", 256, "w8a8"),
        ("Q5_K", 512, "w8a8"),
        ("Q4_0", 256, "w8a8"),
        ("Q5_1", 768, "w8a8"),
        ("Q4_0", 128, "dense"),
        ("Q8_0", 256, "dense"),
        ("Q6_K", 256, "dense"),
        ("BF16", 256, "dense"),
        ("F32", 7, "dense"),
    ],
)
def test_auto_takes_int8_for_four_and_five_bits(qtype, k, want):
    assert resolve_compute("auto", qtype, k) == want
    packed = blocks.quantize(randn(6, k), qtype)
    for tokens, chosen in ((FEW_TOKENS, want), (FEW_TOKENS - 1, "dense")):
        x = randn(tokens, k, seed=1)
        auto = gguf_linear(x, packed, qtype, (6, k))
        assert torch.equal(auto, gguf_linear(x, packed, qtype, (6, k), compute=chosen))


@pytest.mark.parametrize("compute", ["w8a8", "dense"])
def test_gguf_weights_decoded_a_few_rows_at_a_time(compute, monkeypatch):
    x, bias = randn(4, 256), randn(37, seed=2)
    packed = blocks.quantize(randn(37, 256, seed=1), "Q4_K")
    want = gguf_linear(x, packed, "Q4_K", (37, 256), bias, compute=compute)
    monkeypatch.setattr(prequantized, "_CPU_CHUNK", 1000)
    got = gguf_linear(x, packed, "Q4_K", (37, 256), bias, compute=compute)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(reference, "CHUNK", 1000)
    q, scale = reference.dequantize_rotate_quantize(packed, "Q4_K", (37, 256), 256)
    monkeypatch.undo()
    whole = reference.dequantize_rotate_quantize(packed, "Q4_K", (37, 256), 256)
    assert torch.equal(q, whole[0])
    assert torch.equal(scale, whole[1])


@pytest.mark.parametrize(("k", "group"), [(512, 256), (64, 64), (48, 16), (32, 16)])
def test_explicit_int8_takes_the_largest_rotation(k, group):
    packed = blocks.quantize(randn(6, k * 2), "F16")[:, : 2 * k].contiguous()
    x = randn(3, k, seed=1)
    got = gguf_linear(x, packed, "F16", (6, k), compute="w8a8")
    want = gguf_linear(x, packed, "F16", (6, k), compute="w8a8", rotation=group)
    assert torch.equal(got, want)


# ---- linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_linear_is_what_torch_runs(kind, dtype, with_bias, inference):
    bound = {"int8": 0.012, "int8 smooth rotated": 0.022, "Q8_0": 0.007, "Q4_K": 0.09}
    bound |= {"fp8": 0.03, "nf4": 0.11}
    with torch.inference_mode(inference):
        x, weight = randn(2, 7, 512, dtype=dtype), randn(40, 512, seed=1)
        bias = randn(40, seed=2) if with_bias else None
        qt = make(kind, weight)
        got = linear(x, qt, bias)
        assert got.dtype == dtype
        assert got.shape == (2, 7, 40)
        assert torch.equal(F.linear(x, qt, bias), got)
        assert relative(got, F.linear(x.float(), weight, bias)) < bound[kind] + EPS[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_weight(kind):
    x = randn(3, 512).requires_grad_()
    qt = make(kind, randn(40, 512, seed=1))
    out = linear(x, qt, randn(40))
    assert torch.equal(out.detach(), linear(x.detach(), qt, randn(40)))
    out.sum().backward()
    want = torch.ones(3, 40) @ qt.dequantize()
    assert torch.allclose(x.grad, want, rtol=1e-4, atol=1e-4)


def test_plain_and_foreign_weights():
    x, weight = randn(3, 64, dtype=torch.bfloat16), randn(8, 64, seed=1)
    got = linear(x, weight, randn(8))
    assert torch.equal(got, F.linear(x, weight.bfloat16(), randn(8).bfloat16()))
    foreign = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True)
    want = F.linear(x.float(), weight)
    assert relative(linear(x, foreign), want) < 0.02


@pytest.mark.parametrize("kind", ["int8", "Q4_K"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_reach_the_layer(kind, backend, monkeypatch):
    used = []
    real = dispatch.choose

    def spy(op, shape, device, requested="auto", **kind):
        used.append(requested)
        return real(op, shape, device, requested, **kind)

    monkeypatch.setattr(dispatch, "choose", spy)
    x, qt = randn(70, 256), make(kind, randn(8, 256, seed=1))
    got = linear(x, qt, options=LinearOptions(backend=backend))
    assert set(used) == {backend}
    assert torch.equal(got, linear(x, qt))


def test_gguf_compute_option():
    x, qt = randn(3, 256), make("Q8_0", randn(8, 256, seed=1))
    dense, int8 = (linear(x, qt, options=LinearOptions(gguf_compute=c)) for c in ("dense", "w8a8"))
    assert torch.equal(linear(x, qt), dense)
    assert 1e-4 < relative(int8, dense) < 0.012


# ---- errors

Q, S, X = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4), torch.ones(2, 64)
PACKED = torch.zeros(4, 68, dtype=torch.uint8)
BAD = {
    "x int": (lambda: int8_linear(X.int(), Q, S), "x has a dtype"),
    "x fp64": (lambda: int8_linear(X.double(), Q, S), "x has a dtype"),
    "weight dtype": (lambda: int8_linear(X, Q.float(), S), "not int8"),
    "weight 1-D": (lambda: int8_linear(X, Q[0], S), r"weight \[N, K\]"),
    "no columns": (lambda: int8_linear(X[:, :0], Q[:, :0], S), "K > 0"),
    "in_features": (lambda: int8_linear(X[:, :63], Q, S), r"\(2, 63\), needed \[\.\.\., 64\]"),
    "scale": (lambda: int8_linear(X, Q, S[:3]), r"weight_scale.*needed floating point \[4\]"),
    "scale int": (lambda: int8_linear(X, Q, S.int()), "weight_scale"),
    "bias": (lambda: int8_linear(X, Q, S, S[:2]), "bias"),
    "smooth": (lambda: int8_linear(X, Q, S, smooth=S), "smooth"),
    "rotation": (lambda: int8_linear(X, Q, S, rotation=256), "in_features 64"),
    "rotation 8": (lambda: int8_linear(X, Q, S, rotation=8), "found 8"),
    "device": (lambda: int8_linear(X, Q.to("meta"), S), "different devices"),
    "bias device": (lambda: int8_linear(X, Q, S, S.to("meta")), "bias lies on another device"),
    "backend": (lambda: int8_linear(X, Q, S, backend="cutlass"), "'cutlass'"),
    "qtype": (lambda: gguf_linear(X, PACKED, "Q7_7", (4, 64)), "'Q7_7'"),
    "blocks": (lambda: gguf_linear(X, PACKED, "Q4_0", (4, 64)), r"needed torch\.uint8 \(4, 36\)"),
    "blocks dtype": (lambda: gguf_linear(X, PACKED.view(torch.int8), "Q8_0", (4, 64)), "int8"),
    "K of a block": (lambda: gguf_linear(X[:, :40], PACKED, "Q8_0", (4, 40)), "needed"),
    "gguf in_features": (lambda: gguf_linear(X[:, :32], PACKED, "Q8_0", (4, 64)), "in_features"),
    "compute": (lambda: gguf_linear(X, PACKED, "Q8_0", (4, 64), compute="int4"), "'int4'"),
    "dense": (lambda: linear(X, make("fp8", torch.ones(4, 63))), "in_features"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    function, message = BAD[case]
    with pytest.raises(OpError, match=message):
        function()


# ---- dispatch


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


def test_auto_falls_back_in_order_and_warns_once(monkeypatch, caplog):
    dispatch._warn_slow.cache_clear()
    probes = {**dispatch._PROBES, "int_mm": lambda device: (None, "switched off")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.choose("int8_gemm", (1, 2, 3), CPU).name == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "int8 layers run as plain torch formulas on cpu, slowly (int_mm: switched off)"
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


# ---- torch.compile and the custom ops


class Fused(torch.nn.Module):
    """A fused weight, sliced into three, as an attention layer would."""

    def __init__(self, weight, bias, options):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.options = options

    def forward(self, x):
        q, k, v = self.weight.chunk(3)
        parts = linear(x, q, None, self.options) * F.linear(x, k) + linear(x, v)
        return linear(x, self.weight, self.bias, self.options), parts


@pytest.mark.parametrize(
    ("kind", "inference", "backend"),
    [
        *((kind, True, "auto") for kind in KINDS),
        ("int8 smooth rotated", False, "reference"),
        ("Q4_K", False, "auto"),
    ],
)
def test_compiles_without_graph_breaks(kind, inference, backend):
    torch._dynamo.reset()
    with torch.inference_mode(inference):
        weight = make(kind, randn(48, 512, seed=1))
        module = Fused(weight, randn(48), LinearOptions(backend=backend))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for x in (randn(4, 512), randn(70, 512, seed=3)):
            for got, want in zip(compiled(x), module(x), strict=True):
                assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


def test_the_custom_ops_are_sound():
    q, scale = reference.quantize_rows(randn(8, 64))
    packed = blocks.quantize(randn(8, 256), "Q4_K")
    for op, args in (
        (ops_linear._int8_linear_op, (randn(2, 3, 64), q, scale, None, randn(64), 16, "auto")),
        (ops_linear._gguf_linear_op, (randn(3, 256), packed, "Q4_K", scale, "w8a8", 256, "auto")),
    ):
        checks = torch.library.opcheck(op, args)
        assert set(checks.values()) == {"SUCCESS"}


def test_an_op_is_defined_once_for_a_schema():
    def implementation(x):
        return x + 1

    schema = "(Tensor x) -> Tensor"
    first = library.define("test_op", schema, implementation, torch.empty_like)
    again = library.define("test_op", schema, lambda x: x + 2, torch.empty_like)
    assert again is first
    assert torch.equal(again(torch.zeros(2)), torch.ones(2))
    other = library.define(
        "test_op", "(Tensor x, int n) -> Tensor", lambda x, n: x + n, lambda x, n: x
    )
    assert other._schema.name == "ideogram4_quant::test_op_2"
    assert torch.equal(other(torch.zeros(2), 5), torch.full((2,), 5.0))


def test_layouts_are_registered():
    plain = {name for name in layouts.LAYOUTS if "Folded" not in name}
    assert plain == {layout for layout, _ in KINDS.values()}


@pytest.mark.parametrize("compute", ["w8a8", "dense"])
def test_off_the_cpu_a_gguf_weight_is_decoded_at_once(compute, monkeypatch):
    """The path of a GPU, on shapes alone: one decoding, by the backend that was asked for."""
    decoded = []

    def spy(data, qtype, shape, rotation=None):
        decoded.append((tuple(data.shape), shape, rotation))
        return reference.dequantize_rotate_quantize(data, qtype, shape, rotation)

    ops = {**dispatch.REFERENCE_OPS, "dequantize_rotate_quantize": spy}
    probe = {"reference": lambda device: (dispatch.Backend("reference", ops), "spied on")}
    monkeypatch.setattr(dispatch, "_PROBES", {**dispatch._PROBES, **probe})
    x = torch.empty(2, 3, 256, dtype=torch.bfloat16, device="meta")
    packed = blocks.quantize(randn(9, 256), "Q4_K").to("meta")
    bias = torch.empty(9, device="meta")
    out = ops_linear._gguf_linear(x, packed, "Q4_K", bias, compute, 256, "reference")
    assert out.shape == (2, 3, 9)
    assert out.dtype == torch.bfloat16
    assert decoded == ([((9, 144), (9, 256), 256)] if compute == "w8a8" else [])
