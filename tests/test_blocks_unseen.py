"""Inputs that calibration never saw keep their weights, in every encoder."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.ops.blocks import dequantize, quantize
from ideogram4_quant.ops.feedback import Feedback
from ideogram4_quant.quant.input_moments import input_moments, sketch
from ideogram4_quant.quant.treatments import smooth_factors
from ideogram4_quant.tests.block_cases import PACKED
from ideogram4_quant.tests.tensors import randn

NAMES = PACKED
SEEN = torch.rand(1024, generator=torch.Generator().manual_seed(1)) + 0.5
WEIGHT = randn(16, 1024, seed=2)
BLOCK = slice(256, 512)
LARGEST = torch.finfo(torch.float32).max


def error(decoded, columns=slice(None)) -> float:
    lost = (decoded - WEIGHT)[:, columns].double().square().sum()
    return (lost / WEIGHT[:, columns].double().square().sum()).sqrt().item()


def round_trip(name, importance=None, feedback=None):
    data = quantize(WEIGHT, name, importance, feedback=feedback)
    return dequantize(data, name, WEIGHT.shape)


def with_values(value, columns):
    importance = SEEN.clone()
    importance[columns] = value
    return importance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e-7])
def test_blocks_never_seen_are_as_without_importance(name, value):
    found = round_trip(name, with_values(value, BLOCK))
    assert torch.equal(found[:, BLOCK], round_trip(name)[:, BLOCK])
    seen = round_trip(name, with_values(1.0, BLOCK))
    assert error(found, slice(512, 1024)) <= 1.001 * error(seen, slice(512, 1024))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1e-30])
@pytest.mark.parametrize("columns", [slice(0, None, 2), slice(0, None, 7), slice(64, 96)])
def test_unseen_inputs_among_seen_ones_are_kept(name, value, columns):
    found = round_trip(name, with_values(value, columns))
    assert error(found, columns) < 2 * error(round_trip(name), columns)


@pytest.mark.parametrize("name", NAMES)
def test_all_zero_is_as_none(name):
    assert torch.equal(round_trip(name, torch.zeros(1024)), round_trip(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e15, LARGEST / 2])
def test_only_ratios_of_importance_count(name, factor):
    usual = round_trip(name, SEEN)
    assert error(round_trip(name, SEEN * factor)) == pytest.approx(error(usual), rel=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_with_the_largest_floats(name):
    importance = with_values(LARGEST, BLOCK)
    importance[512:768], importance[768:] = 0, 1e-30
    found, plain = round_trip(name, importance), round_trip(name)
    assert error(found, BLOCK) < 1.03 * error(plain, BLOCK)
    for columns in (slice(0, 256), slice(512, 768), slice(768, 1024)):
        assert error(found, columns) <= error(plain, columns)


def feedback_of(square):
    directions = randn(len(square), 4, seed=3) * 0.3 * square.sqrt()[:, None]
    return Feedback(square, directions)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e-30, 1e-7])
def test_error_feedback_piles_nothing_on_unseen_blocks(name, value):
    square = with_values(value, BLOCK)
    directions = randn(1024, 4, seed=3) * 0.3
    directions[BLOCK] = 0  # inputs that were silent are in no direction
    found = round_trip(name, square, Feedback(square, directions))
    assert error(found, BLOCK) <= 1.001 * error(round_trip(name), BLOCK)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_error_feedback_counts_ratios_alone(name, factor):
    usual = round_trip(name, SEEN, feedback_of(SEEN))
    found = round_trip(name, SEEN * factor, feedback_of(SEEN * factor))
    assert error(found) == pytest.approx(error(usual), rel=0.06)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-10])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_smoothing_leaves_silent_channels_alone(value, share):
    x = torch.full((512,), 3.0)
    x[::5] = 90.0
    silent = torch.arange(512) < 512 * share
    x[silent] = value
    factors = smooth_factors(x, WEIGHT[:, :512].abs().amax(0))
    assert (factors[silent] == 1).all()
    weight = WEIGHT[:, :512] * factors.float()
    step = weight.abs().amax(1, keepdim=True) / 127
    decoded = (weight / step).round() * step / factors.float()
    lost = (decoded - WEIGHT[:, :512])[:, silent].norm() / WEIGHT[:, :512][:, silent].norm()
    assert lost < 0.05


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e15])
def test_moments_of_loud_and_silent_inputs_are_finite(size):
    x = randn(64, 256, seed=4) * size
    x[:, :100] = 0
    x[:, 100:128] *= 1e-12
    moments = input_moments(x.double().square().sum(0), sketch(x), len(x))
    assert moments.square.isfinite().all()
    assert (moments.square > 0).all()
    assert moments.directions.isfinite().all()
    assert not moments.directions[:100].any()
    led = moments.damped()
    assert led.feedback() is not None
    assert led.scaled(torch.full((256,), 2.0)).rotated(256).feedback() is not None


def test_moments_of_silence_are_none():
    x = torch.full((8, 256), 1e-30)
    assert input_moments(x.double().square().sum(0), sketch(x), 8) is None
