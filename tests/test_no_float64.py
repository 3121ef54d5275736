"""Quantizing and calibrating on a device that refuses float64, as Apple's GPUs do."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.ops import attention, blocks, wide
from ideogram4_quant.ops.feedback import Feedback
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant.input_moments import input_moments, sketch
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.quant.measure import ErrorMeter
from ideogram4_quant.quant.profiler import Profiler
from ideogram4_quant.tests.no_float64 import DEVICE, NoFloat64
from ideogram4_quant.tests.tensors import randn


@pytest.fixture
def refusing(monkeypatch):
    monkeypatch.setattr(wide, "_WITHOUT", frozenset({DEVICE.type}))
    # torch makes no stand-ins of views in inference mode
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())
    with torch.no_grad(), NoFloat64():
        yield


def test_the_pretended_device_refuses_float64(refusing):
    x = randn(3, 4).to(DEVICE)
    assert x.device.type == DEVICE.type
    assert (x + 1).device.type == DEVICE.type
    for make in (x.double, lambda: x.sum(dtype=torch.float64), lambda: x.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            make()


def test_sums_are_those_of_float64(refusing):
    values = torch.full((3, 1 << 20), 0.1)
    there = values.to(DEVICE)
    exact = (1 << 20) * float(torch.tensor(0.1))  # of fp32's 0.1, in Python's floats
    assert wide.wide_sum(there, 1).tolist() == pytest.approx([exact] * 3, rel=1e-12)
    assert wide.wide_sum(there).item() == pytest.approx(3 * exact, rel=1e-12)
    assert wide.wide(there).dtype == torch.float64


@pytest.mark.parametrize("qtype", ["Q8_0", "Q5_1", "Q4_0", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("fed_back", [False, True])
def test_blocks_are_encoded_as_on_the_cpu(refusing, qtype, fed_back):
    weight, x = randn(4, 512), randn(64, 512, seed=1)
    moments = input_moments(x.double().square().sum(0), sketch(x), 64)
    feedback = moments.feedback() if fed_back else None
    wanted = blocks.quantize(weight, qtype, moments.square, feedback=feedback)
    square = moments.square.to(DEVICE)
    found = blocks.quantize(weight.to(DEVICE), qtype, square, feedback=feedback)
    assert found.device.type == DEVICE.type
    assert torch.equal(found.cpu(), wanted)
    nearest = blocks.quantize(weight.to(DEVICE), qtype)
    assert torch.equal(nearest.cpu(), blocks.quantize(weight, qtype))


def test_codes_with_feedback_are_those_of_the_cpu(refusing):
    weight, step = randn(8, 64), torch.full((8, 1), 0.1)
    feedback = Feedback(torch.ones(64), 0.2 * randn(64, 3))
    wanted = feedback.round(weight, step, None, (-127, 127))
    found = feedback.round(weight.to(DEVICE), step.to(DEVICE), None, (-127, 127))
    for a, b in zip(found, wanted, strict=True):
        assert a.device.type == DEVICE.type
        assert torch.equal(a.cpu(), b)


def test_errors_and_statistics(refusing):
    weight, x = randn(8, 64), randn(32, 64, seed=1)
    stored = weight + 0.01
    meter = ErrorMeter()
    meter.add(weight.to(DEVICE), stored.to(DEVICE))
    assert meter.signal == pytest.approx(weight.double().square().sum().item(), rel=1e-12)
    assert meter.noise == pytest.approx(8 * 64 * 1e-4, rel=1e-3)
    there = LayerStats.of(x.to(DEVICE), weight.to(DEVICE))
    assert torch.equal(there.square_sum.cpu(), x.double().square().sum(0))
    assert torch.allclose(rotate(x.to(DEVICE), 64).cpu(), rotate(x, 64), atol=1e-6)
    q = randn(1, 2, 16, 32).to(DEVICE)
    assert attention.reference(q, q, q).device.type == DEVICE.type


def test_a_profile_is_the_one_of_the_cpu(refusing):
    def profile(device):
        linear = torch.nn.Linear(256, 32, bias=False)
        linear.weight = torch.nn.Parameter(randn(32, 256).to(device), requires_grad=False)
        profiler = Profiler({"conditional.layers.0.attention.qkv": linear}, [1.0])
        for watch in (profiler.statistics, profiler.errors):
            with watch():
                for sample in range(2):
                    profiler.sample(sample)
                    profiler.at(1.0)
                    linear(randn(40, 256, seed=sample).to(device))
        return next(iter(profiler._seen.values())).stats

    found, wanted = profile(DEVICE), profile("cpu")
    assert torch.equal(found.square_sum, wanted.square_sum)
    assert torch.allclose(found.power_sums, wanted.power_sums, rtol=1e-12)
    assert torch.equal(found.signal, wanted.signal)
    assert found.noise.keys() == wanted.noise.keys()
    for name, noise in wanted.noise.items():
        assert torch.allclose(found.noise[name], noise, rtol=1e-6), name
