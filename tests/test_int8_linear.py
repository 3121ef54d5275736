"""INT8 linears: every backend against the reference, bad rows, tiles, what is copied."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from ideogram4_quant.ops import (
    adapters,
    blocks,
    chunks,
    dispatch,
    fused,
    prequantized,
    reference,
)
from ideogram4_quant.ops import linear as ops_linear
from ideogram4_quant.ops.fused import Gated, Normed
from ideogram4_quant.ops.linear import gguf_linear, int8_linear, linear
from ideogram4_quant.tests.linear_cases import BACKENDS, CPU, EPS, SHAPES, make
from ideogram4_quant.tests.tensors import randn, relative
from ideogram4_quant.tests.watch import Watch

torch.set_num_threads(1)


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


@pytest.mark.parametrize(("group", "within"), [(256, True), (1024, False), (4, False)])
def test_groups_that_comfy_kitchens_kernels_lack_are_rotated_before(monkeypatch, group, within):
    registry = pytest.importorskip("comfy_kitchen.registry").registry
    given = {}

    def implementation(op, backend, arguments):
        return lambda **kwargs: given.update(kwargs) or kwargs["x"]

    monkeypatch.setattr(registry, "get_implementation", implementation)
    x = randn(3, 1024)
    q, scale = reference.quantize_rows(randn(8, 1024))
    adapters.comfy_kitchen_linear(x, q, scale, rotation=group)
    assert given["convrot"] is within
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    h = torch.ones(1, 1)
    while len(h) < group:
        h = torch.kron(h, h4)
    want = x if within else (x.reshape(-1, group) @ h).reshape(x.shape)
    assert torch.allclose(given["x"], want, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_fused_activation_of_a_long_rotation(backend):
    gate, up = randn(5, 4096), randn(5, 4096, seed=1)
    q, scale = Gated(gate, up).rows(None, 1024, backend)
    got = reference.rotate(q.float() * scale[:, None], 1024)
    want = F.silu(gate) * up
    assert relative(got, want) < 0.02
    q, scale = Normed(gate, torch.ones(4096), torch.ones(1, 4096), 1e-6).rows(None, 4096, backend)
    got = reference.rotate(q.float() * scale[:, None], 4096)
    assert relative(got, F.rms_norm(gate, (4096,), eps=1e-6)) < 0.02


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_rotation_longer_than_the_kernels_know(backend):
    x, w = randn(5, 4096), randn(7, 4096, seed=1)
    q, scale = reference.quantize_rows(reference.rotate(w, 4096))
    got = int8_linear(x, q, scale, rotation=4096, backend=backend)
    assert relative(got, x @ w.t()) < 0.02


def test_the_epilogue_in_tiles(monkeypatch):
    x = randn(37, 64)
    q, scale = reference.quantize_rows(randn(10, 64, seed=1))
    want = int8_linear(x, q, scale, randn(10, seed=2), backend="int_mm")
    monkeypatch.setattr(chunks, "TILED", 50)
    assert torch.equal(int8_linear(x, q, scale, randn(10, seed=2), backend="int_mm"), want)


@pytest.mark.parametrize("rotation", [None, 64])
def test_quantizing_in_tiles_changes_nothing(rotation, monkeypatch):
    monkeypatch.setattr(chunks, "TILED", 300)
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
