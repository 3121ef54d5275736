"""Hooks of newer comfy-kitchen: activation, norm and modulation inside an int8 linear."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ideogram4_quant.ops.gguf_compute import FEW_TOKENS
from ideogram4_quant.ops.layouts import QuantizedTensor
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.tests.tensors import randn, relative

KINDS = {
    "int8": ("Ideogram4QuantInt8", {}),
    "int8 smooth rotated": ("Ideogram4QuantInt8", {"rotation": 64}),
    "Q4_K": ("Ideogram4QuantGGUF", {"qtype": "Q4_K"}),
}
HALF = FEW_TOKENS // 2  # a batch of two: a GGUF weight is multiplied as int8 from FEW_TOKENS on


def make(kind, weight):
    layout, options = KINDS[kind]
    if "smooth" in kind:
        options = {**options, "smooth": torch.linspace(0.6, 2.5, weight.shape[1])}
    return QuantizedTensor.from_float(weight, layout, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_with_an_activation_inside(kind):
    x, wide = randn(2, HALF, 512), randn(2, HALF, 1024, seed=3)
    qt, bias, norm = make(kind, randn(40, 512, seed=1)), randn(40), randn(512, seed=4)
    act = qt.layout_cls.linear_input_act
    assert torch.equal(act(qt, x, bias), linear(x, qt, bias))
    gate, up = wide.chunk(2, dim=-1)
    got = act(qt, wide, bias, "swiglu")
    assert relative(got, linear(F.silu(gate) * up, qt, bias)) < 2e-3
    normed = F.rms_norm(x, (512,), norm, 1e-5)
    residual, factor = randn(2, HALF, 40, seed=5), randn(40, seed=6)
    got = act(qt, x, bias, "rms_norm", norm, 1e-5, residual, factor)
    assert relative(got, residual + factor * linear(normed, qt, bias)) < 2e-3
    assert act(qt, x, bias, "gelu_tanh") is NotImplemented
    assert act(qt.t(), x) is NotImplemented
    assert act(qt, x, bias, "swiglu") is NotImplemented
    if hasattr(QuantizedTensor, "linear_input_act"):
        assert torch.equal(qt.linear_input_act(x, bias), linear(x, qt, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_with_a_modulated_norm_inside(kind):
    x, qt, bias = randn(2, HALF, 512), make(kind, randn(40, 512, seed=1)), randn(40)
    norm, modulation = randn(512, seed=4), randn(1, 1, 512, seed=5)
    fused = qt.layout_cls.fused_rms_modulated
    want = linear(F.rms_norm(x, (512,), norm, 1e-5) * (1 + modulation), qt, bias)
    assert relative(fused(x, qt, bias, norm, 1e-5, modulation), want) < 2e-3
    assert fused(x, qt, bias, norm, 1e-5, modulation.expand(2, 1, 512)) is NotImplemented


@pytest.mark.parametrize("act", [None, "swiglu", "rms_norm"])
@pytest.mark.parametrize("rotation", [None, 64])
def test_the_hook_means_what_comfy_kitchens_own_layout_means(act, rotation):
    """Its own INT8 layout takes the same arguments, and gives the same up to roundings to int8."""
    if not hasattr(QuantizedTensor, "linear_input_act"):
        pytest.skip("this comfy-kitchen is older than the hook")
    weight, bias = randn(40, 512, seed=1), randn(40)
    x = randn(2, HALF, 1024 if act == "swiglu" else 512, seed=3)
    norm = (
        {"input_act_weight": randn(512, seed=4), "input_act_eps": 1e-5} if act == "rms_norm" else {}
    )
    tail = {"residual": randn(2, HALF, 40, seed=5), "residual_scale": randn(40, seed=6)}
    theirs = QuantizedTensor.from_float(
        weight,
        "TensorWiseINT8Layout",
        per_channel=True,
        convrot=rotation is not None,
        convrot_groupsize=rotation or 256,
    )
    ours = QuantizedTensor.from_float(weight, "Ideogram4QuantInt8", rotation=rotation)
    want = theirs.linear_input_act(x, bias, act, **norm, **tail)
    got = ours.linear_input_act(x, bias, act, **norm, **tail)
    assert relative(got, want) < 5e-3


def test_what_is_not_multiplied_as_int8_leaves_the_parts_to_the_caller():
    weight, x, norm = randn(40, 512, seed=1), randn(2, HALF, 512), torch.ones(512)
    q8 = QuantizedTensor.from_float(weight, "Ideogram4QuantGGUF", qtype="Q8_0")
    assert q8.layout_cls.linear_input_act(q8, x) is NotImplemented
    q4 = make("Q4_K", weight)
    few = x[:, :3]
    assert q4.layout_cls.linear_input_act(q4, few) is NotImplemented
    assert q4.layout_cls.fused_rms_modulated(few, q4, None, norm, 1e-5, norm) is NotImplemented
    for layout in ("Ideogram4QuantFP8", "Ideogram4QuantNF4"):
        other = QuantizedTensor.from_float(weight, layout)
        if hasattr(QuantizedTensor, "linear_input_act"):
            assert other.linear_input_act(x) is NotImplemented


@pytest.mark.slow
def test_the_oldest_comfy_kitchen_that_is_supported(tmp_path):
    """The tests of linears and layouts on 0.2.31, ahead on the path of the newer one here."""
    old = tmp_path / "old"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old)]
    done = subprocess.run([*pip, "comfy-kitchen==0.2.31"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"comfy-kitchen 0.2.31 cannot be installed here: {done.stderr[-300:]}")
    here = Path(__file__).parent
    paths = [str(old), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = "import comfy_kitchen, importlib.metadata as m; print(m.version('comfy-kitchen'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    version = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert version.stdout.strip() == "0.2.31"
    names = ("linear", "int8_linear", "gguf_linear", "layouts", "layout_operations", "layout_hooks")
    files = [here / f"test_{name}.py" for name in names]
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
