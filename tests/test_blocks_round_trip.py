"""Weights encoded in blocks and decoded again: the error, with importance and without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideogram4_quant.tests.block_cases import K_FORMATS, NAMES, PACKED, SIMPLE, planted, round_trip
from ideogram4_quant.tests.tensors import randn

torch.set_num_threads(1)

# |error| in steps of (max - min) / (codes - 1): half a step, or a whole one where the code range is
# not symmetric and clips the value opposite to the peak; then what the coarse scales add.
STEPS = {"Q8_0": 0.51, "Q4_0": 1.02, "Q4_1": 0.51, "Q5_0": 1.02, "Q5_1": 0.51}


def rmse(weight, name, importance=None):
    return (round_trip(weight, name, importance) - weight).double().square().mean().sqrt().item()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SIMPLE),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.floats(1e-3, 1e3),
    shift=st.floats(-2, 2),
)
def test_simple_formats_stay_within_their_step(name, seed, magnitude, shift):
    weight = (randn(3, 64, seed=seed) + shift) * magnitude
    blocks = weight.view(-1, 32)
    peak = blocks.abs().amax(1, keepdim=True)
    if name.endswith("_1"):
        step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / (
            15 if name == "Q4_1" else 31
        )
    else:
        step = peak / {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}[name]
    error = (round_trip(weight, name).view(-1, 32) - blocks).abs()
    assert (error <= STEPS[name] * step + 2.0**-9 * peak).all()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(K_FORMATS),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.floats(1e-3, 1e3),
    shift=st.floats(-2, 2),
    weighted=st.booleans(),
)
def test_k_formats_beat_one_scale_for_the_whole_block(name, seed, magnitude, shift, weighted):
    weight = (randn(1, 512, seed=seed) + shift) * magnitude
    importance = torch.ones(512) if weighted else None
    blocks = weight.view(-1, 256)
    error = (round_trip(weight, name, importance).view(-1, 256) - blocks).square().mean(1).sqrt()
    step = 2 * blocks.abs().amax(1) / ((1 << int(name[1])) - 1)
    assert (error <= step / 12**0.5).all()  # of a uniform quantizer over +-peak


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(PACKED), data=st.data())
def test_hostile_blocks_decode_to_finite_values_near_them(name, data):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-8, -1e-30, 1e-42, 1.5, 3e3, -3e3])
    weight = torch.tensor(data.draw(st.lists(values, min_size=256, max_size=256)))
    got = round_trip(weight, name)
    assert got.isfinite().all()
    # 1/15 of the range is the coarsest step (with two bits 1/3); the peak's own rounding comes on
    # top.
    bound = 0.3 if name == "Q2_K" else 0.15
    assert ((got - weight).abs() <= bound * weight.abs().max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_blocks_stay_zero(name):
    weight = randn(3, 512, seed=7)
    weight[1] = 0
    weight[2] = -0.0
    assert (round_trip(weight, name)[1:] == 0).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.123, -7.3])
@pytest.mark.parametrize("name", PACKED)
def test_constant_blocks_keep_their_value(name, value):
    got = round_trip(torch.full((1, 256), value), name)
    assert ((got - value).abs() <= abs(value) * 2.0**-9).all()


@pytest.mark.parametrize("name", PACKED)
def test_an_outlier_costs_only_its_own_group(name):
    weight = randn(1, 256, seed=8) * 0.01
    weight[0, 70] = 100.0
    got = round_trip(weight, name)
    assert got[0, 70] == pytest.approx(100.0, rel=0.01)
    others = torch.cat([got[0, :64] - weight[0, :64], got[0, 96:] - weight[0, 96:]])
    shared = name.endswith(("_K", "_XS"))  # their group scales share one float16
    assert others.abs().max() <= (0.1 if shared else 0.01)


def test_more_bits_err_less():
    weight = randn(64, 512, seed=9)
    falling = (
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q5_1",
        "Q5_0",
        "Q4_K",
        "IQ4_NL",
        "IQ4_XS",
        "Q4_0",
        "Q3_K",
        "Q2_K",
    )
    errors = [rmse(weight, name) for name in falling]
    assert errors == sorted(errors)
    assert (
        rmse(weight, "Q4_K") < rmse(weight, "Q4_1") < rmse(weight, "Q4_0") < rmse(weight, "MXFP4")
    )


@pytest.mark.parametrize("name", PACKED)
def test_importance_moves_the_error_to_columns_that_matter_less(name):
    weight = randn(64, 512, seed=10)
    importance = torch.where(torch.arange(512) % 4 == 0, 100.0, 1.0)

    def weighted_error(values):
        return ((values - weight).square() * importance).sum().item()

    plain, weighted = round_trip(weight, name), round_trip(weight, name, importance)
    assert weighted_error(weighted) < 0.95 * weighted_error(plain)


@pytest.mark.parametrize("name", PACKED)
def test_importance_never_costs_a_block_more_than_its_error_without(name):
    """On what breaks encoders, and where whole groups or blocks count for nothing."""
    weight = planted(seed=16)
    importance = randn(512, seed=17).square()
    importance[64:96], importance[256:] = 0, 0
    got = round_trip(weight, name, importance)
    assert got.isfinite().all()
    error = ((got - weight).double().square() * importance).sum(1)
    plain = ((round_trip(weight, name) - weight).double().square() * importance).sum(1)
    energy = (weight.double().square() * importance).sum(1)
    assert (error <= plain * 1.001 + 1e-5 * energy).all(), (error / plain).tolist()
    assert ((got - weight).abs() <= 2 * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("tail", ["lognormal", "outliers", "student"])
def test_output_error_falls_by_half_a_decibel_on_heavy_tailed_inputs(name, tail):
    """Calibrated on one half of the tokens, measured on the other, against no calibration."""
    generator = torch.Generator().manual_seed(18)
    tokens = torch.randn(1024, 512, generator=generator)
    if tail == "lognormal":
        tokens *= torch.randn(512, generator=generator).exp()
    elif tail == "outliers":
        tokens[:, ::43] *= 30
    else:  # every token has its own scale, and so has every channel
        channels = torch.randn(4, 512, generator=generator).square().sum(0).rsqrt()
        tokens *= torch.randn(1024, 4, generator=generator).square().sum(1, keepdim=True).rsqrt()
        tokens *= 2 * channels
    calibration, fresh = tokens.chunk(2)
    weight = randn(128, 512, seed=19) * 0.02

    def output_error(stored):
        return (fresh @ (stored - weight).T).square().sum()

    weighted = round_trip(weight, name, calibration.square().mean(0))
    gain = 10 * (output_error(round_trip(weight, name)) / output_error(weighted)).log10()
    assert gain > 0.5
