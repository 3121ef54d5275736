"""``linear`` for any layout: options, errors, gradients, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import (
    blocks,
    dispatch,
    layouts,
    library,
    reference,
)
from ideogram4_quant.ops import linear as ops_linear
from ideogram4_quant.ops.fold import Fold
from ideogram4_quant.ops.layouts import folded_tensor
from ideogram4_quant.ops.linear import (
    LinearOptions,
    gguf_linear,
    int8_linear,
    linear,
)
from ideogram4_quant.tests.linear_cases import BACKENDS, EPS, KINDS, make
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

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


INT8_GRIDS = {
    "INT8": lambda w: QuantizedTensor.from_float(w, "Ideogram4QuantInt8", rotation=256),
    "INT8 smooth": lambda w: QuantizedTensor.from_float(
        w, "Ideogram4QuantInt8", smooth=torch.linspace(0.5, 2, 256)
    ),
    "W4A8": lambda w: QuantizedTensor.from_float(w, "Ideogram4QuantW4A8"),
    "W6A8": lambda w: QuantizedTensor.from_float(w, "Ideogram4QuantW4A8", bits=6),
    "INT4": lambda w: QuantizedTensor.from_float(w, "Ideogram4QuantW4A4"),
    "folded": lambda w: folded_tensor(
        QuantizedTensor.from_float(w, "Ideogram4QuantInt8"),
        Fold(smooth=torch.linspace(0.5, 2, 256)),
    ),
}


@pytest.mark.parametrize("kind", INT8_GRIDS)
def test_dense_int8_rounds_no_activation(kind):
    """The product of the decoded weight in fp64, which W8A8 is a hundredth from."""
    x, qt, bias = randn(5, 256), INT8_GRIDS[kind](randn(8, 256, seed=1)), randn(8, seed=2)
    want = F.linear(x.double(), qt.dequantize().double(), bias.double())
    dense, int8 = (linear(x, qt, bias, LinearOptions(int8_compute=c)) for c in ("dense", "w8a8"))
    assert relative(dense, want) < 1e-6
    assert 1e-3 < relative(int8, want) < 0.02


def test_unknown_int8_compute():
    with pytest.raises(OpError, match="'int4', needed auto or w8a8 or dense"):
        LinearOptions(int8_compute="int4")


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
    "plain in_features": (lambda: linear(X, torch.ones(4, 63)), "in_features"),
    "plain bias": (lambda: linear(X, torch.ones(4, 64), S[:3]), "bias does not fit"),
    # the weight was cast to whole numbers: 0.3 is 0
    "plain x int": (lambda: linear(X.int(), torch.full((4, 64), 0.3)), "x has a dtype"),
    "plain 1-D": (lambda: linear(X, torch.ones(64)), r"weight \[N, K\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    function, message = BAD[case]
    with pytest.raises(OpError, match=message):
        function()


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


OF_THE_HOST = {f"Ideogram4Quant{name}" for name in ("W4A8", "W4A4", "NVFP4", "MXFP8", "AWQ")}
"""Containers of the host, which take whole groups alone: see ``test_layout_stock.py``."""


def test_layouts_are_registered():
    any_size = {name for name in layouts.LAYOUTS if "Folded" not in name} - OF_THE_HOST
    assert any_size == {layout for layout, _ in KINDS.values()}
    assert set(layouts.LAYOUTS) >= OF_THE_HOST


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
