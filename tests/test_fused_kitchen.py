"""The fused block on comfy-kitchen's own fusions: its eager backend stands for the CUDA one."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.registry import registry

from ideogram4_quant.ops import adapters, dispatch, prequantized, reference
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.tests.fused_block import Block
from ideogram4_quant.tests.tensors import randn, relative

pytestmark = pytest.mark.usefixtures("nothing_measured")

CPU = torch.device("cpu")
KITCHEN = LinearOptions(backend="comfy_kitchen")


@pytest.fixture
def kitchen(monkeypatch) -> list[str | None]:
    """comfy-kitchen's eager backend on the CPU; what it was asked to do before each product."""
    monkeypatch.setattr(adapters, "kitchen_backend", lambda: "eager")
    backend = dispatch.Backend("comfy_kitchen", adapters.kitchen_ops())
    probes = {**dispatch._PROBES, "comfy_kitchen": lambda device: (backend, "eager")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    monkeypatch.setattr(dispatch, "_ORDER", {"cpu": ("comfy_kitchen", "int_mm")})
    asked: list[str | None] = []
    own = registry.get_implementation

    def watching(name, backend=None, kwargs=None):
        if name == "int8_linear" and kwargs:
            asked.append(kwargs.get("input_act"))
        return own(name, backend, kwargs)

    monkeypatch.setattr(registry, "get_implementation", watching)
    return asked


ALL_FIVE = ["rms_norm", None, "rms_norm", "rms_norm", None]  # qkv, o, w1, w3, w2


@pytest.mark.parametrize("options", [KITCHEN, LinearOptions()], ids=["named", "auto"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_norms_are_made_inside_the_linears(kitchen, options, bias):
    block = Block(options=options, bias=bias)
    inputs = block.inputs(1, 37)
    found = block.fused(*inputs)
    assert kitchen == ALL_FIVE
    block.options = LinearOptions(backend="reference")
    assert relative(found, block.unfused(*inputs)) < 1e-3


def test_no_less_exact_in_bf16(kitchen):
    block = Block(dtype=torch.bfloat16, options=KITCHEN)
    inputs = block.inputs(1, 37)
    found, exact = block.fused(*inputs), block.exact(*inputs)
    assert found.dtype == torch.bfloat16
    assert kitchen == ALL_FIVE
    assert relative(found, exact) < 1.05 * relative(block.unfused(*inputs), exact)


@pytest.mark.parametrize(
    ("kinds", "batch", "wanted"),
    [
        ({"*": "int8 rotated"}, 2, 0),  # a modulation for each picture
        ({"*": "int8"}, 1, 0),  # its quantizer makes a norm where it rotates
        ({"*": "int8 smooth rotated"}, 1, 0),
        ({"w1": "int8", "*": "int8 rotated"}, 1, 2),
        ({"w1": "Q4_K", "w2": "bf16", "*": "int8 rotated"}, 1, 2),
    ],
    ids=str,
)
def test_what_it_cannot_make_inside_is_made_before(kitchen, kinds, batch, wanted):
    block = Block(kinds=kinds, options=LinearOptions(gguf_compute="dense"))
    inputs = block.inputs(batch, 5)
    found = block.fused(*inputs)
    assert kitchen.count("rms_norm") == wanted
    block.options = LinearOptions(backend="reference", gguf_compute="dense")
    assert relative(found, block.unfused(*inputs)) < 1e-3


def test_compiled_it_is_one_graph_and_the_same(kitchen):
    torch._dynamo.reset()
    block = Block(options=LinearOptions())
    inputs = block.inputs(1, 37)
    with torch.no_grad():
        compiled = torch.compile(block.fused, fullgraph=True, backend="aot_eager")
        kitchen.clear()
        found = compiled(*inputs)
        assert kitchen == ALL_FIVE
        assert relative(found, block.fused(*inputs)) < 1e-3


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_norm_is_the_formulas_with_its_eps(kitchen, size):
    """Of small rows eps is most of what they are divided by: ten times it is two thirds off."""
    x, norm, scale = size * randn(1, 9, 256), 1 + 0.2 * randn(256, seed=1), 1 + randn(256, seed=2)
    weight, weight_scale = reference.quantize_rows(randn(40, 256, seed=3))
    arguments = (x, norm, scale, 1e-5, weight, weight_scale, None, 256)
    found = adapters.comfy_kitchen_normed_linear(*arguments)
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm * scale
    wanted = reference.int8_linear(normed.float(), weight, weight_scale, rotation=256)
    assert relative(found, wanted) < 1e-3


def test_an_older_one_multiplies_as_it_did(kitchen, monkeypatch):
    def int8_linear(x, weight, weight_scale, bias, out_dtype, convrot, convrot_groupsize):
        """0.2.31's parameters."""

    monkeypatch.setattr(registry, "get_implementation", lambda *_: int8_linear)
    assert set(adapters.kitchen_ops()) == {"int8_linear"}


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("eager", [True, False], ids=["its op", "no op"])
def test_the_gated_residual_is_the_formula(kitchen, monkeypatch, tokens, eager):
    if not eager:  # as on CUDA
        constraints = dict(registry._capabilities)
        constraints["eager"] = constraints["eager"] - {"rms_gated_residual"}
        monkeypatch.setattr(registry, "_capabilities", constraints)
    x, y, gate, weight = randn(2, tokens, 96), randn(2, tokens, 96), randn(2, 1, 96), randn(96)
    found = adapters.comfy_kitchen_residual(x, gate, y, weight, 1e-5)
    assert relative(found, reference.gate_residual_rmsnorm(x, gate, y, weight, 1e-5)) < 1e-6


def test_the_custom_op_is_sound_with_any_backend(kitchen):
    x, weight, scale = randn(1, 5, 256), randn(8, 256), torch.ones(8)
    codes = weight.mul(30).round().clamp(-127, 127).to(torch.int8)
    norm, factors = randn(256, seed=1), 1 + randn(1, 1, 256, seed=2)
    for backend in ("comfy_kitchen", "int_mm", "reference"):
        args = (x, norm, factors, 1e-5, codes, scale, None, 256, backend)
        torch.library.opcheck(prequantized._normed_linear_op, args)
        values = torch.nn.functional.rms_norm(x, (256,), norm, 1e-5) * factors
        wanted = reference.int8_linear(values, codes, scale, rotation=256)
        assert relative(prequantized.normed_linear(*args), wanted) < 1e-3


def test_rows_are_left_where_nothing_makes_them():
    assert dispatch.quantizes_rows(CPU)  # neither Triton nor a linear as a whole


def test_with_no_kernel_for_rows_the_whole_linear_is_taken(kitchen):
    assert not dispatch.quantizes_rows(CPU)
    (report,) = (r for r in dispatch.reports(CPU) if r.name == "comfy_kitchen")
    assert report.fuses
    assert dispatch.choose("gate_residual_rmsnorm", (1, 1, 256), CPU).name == "comfy_kitchen"
