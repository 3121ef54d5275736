"""Block encoding: bytes against gguf-py, error bounds, determinism, and what is refused.

Bytes as ggml's and errors below its own are held to its C code in test_blocks_ggml.py.
"""

from __future__ import annotations

import logging

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from ideogram4_quant.ops.blocks import FORMATS, base, dequantize, quantize
from ideogram4_quant.ops.blocks.search import ordered_sum
from ideogram4_quant.ops.errors import OpError

torch.set_num_threads(1)

NAMES = list(FORMATS)
FLOATS = ["F32", "F16", "BF16"]
SIMPLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_FORMATS = ["Q4_K", "Q5_K", "Q6_K"]
PACKED = SIMPLE + K_FORMATS

# |error| in steps of (max - min) / (codes - 1): half a step, or a whole one where the code range is
# not symmetric and clips the value opposite to the peak; then what the coarse scales add.
STEPS = {"Q8_0": 0.51, "Q4_0": 1.02, "Q4_1": 0.51, "Q5_0": 1.02, "Q5_1": 0.51}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed=0):
    """[16, 512] with the rows that break encoders: zeros, constants, ties, outliers, tiny ones."""
    weight = randn(16, 512, seed=seed) * 0.02
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -0.37
    weight[3, 100] = 30.0
    weight[4, 200] = -3e4
    weight[5, :40] = 0
    weight[6] *= 1e-6
    weight[7, ::2], weight[7, 1::2] = 0.5, -0.5  # both signs reach the peak
    weight[8] = torch.arange(512) % 17 - 8.0  # exact integers: ties in rounding
    weight[9].abs_()
    weight[10].abs_().neg_()
    weight[11] *= torch.logspace(-6, 1, 512)
    weight[12] = weight[12].bfloat16().float()
    weight[13] *= 1e-12  # its float16 scales are zero
    return weight


def round_trip(weight, name, importance=None):
    return dequantize(quantize(weight, name, importance), name, weight.shape)


def rmse(weight, name, importance=None):
    return (round_trip(weight, name, importance) - weight).double().square().mean().sqrt().item()


# ---- bytes


@pytest.mark.parametrize("name", FLOATS + SIMPLE)
def test_equals_gguf_py(name):
    weight = torch.cat([planted(), randn(64, 512, seed=1)])
    want = gguf_quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    got = quantize(weight, name).numpy()
    assert np.array_equal(got, want.view(np.uint8).reshape(got.shape))


@pytest.mark.parametrize("name", SIMPLE)
def test_equals_gguf_py_on_negative_zeros(name):
    weight = -torch.zeros(1, 64)
    want = gguf_quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(weight, name).numpy(), want)


def test_q8_0_rounds_halves_away_from_zero():
    weight = torch.zeros(32)
    weight[:6] = torch.tensor([127.0, 0.5, -0.5, 2.5, 0.49999997, -1.4999999])  # d is exactly 1
    codes = quantize(weight, "Q8_0")[2:].view(torch.int8)
    assert codes[:6].tolist() == [127, 1, -1, 3, 0, -1]


def test_a_q6_k_block_made_by_hand():
    """One weight in the second half: where its bits go."""
    weight = torch.zeros(256)
    weight[128 + 64 + 5] = -32.0  # run 2 of half 1, weight 5: group 12, code 0 after the offset
    weight[128 + 64 + 6] = 31.0  # code 63
    block = quantize(weight, "Q6_K")
    scales = block[192:208].view(torch.int8)
    assert scales.tolist() == [0] * 12 + [-128] + [0] * 3
    assert block[208:].view(torch.float16).item() * scales[12].item() == 1.0
    assert block[64 + 5] >> 4 == 0
    assert block[64 + 6] >> 4 == 15
    assert (block[128 + 32 + 5] >> 4) & 3 == 0
    assert (block[128 + 32 + 6] >> 4) & 3 == 3


@pytest.mark.parametrize("name", PACKED)
def test_bytes_depend_neither_on_threads_nor_on_chunks(name, monkeypatch):
    weight = torch.cat([planted()[:12], randn(9, 512, seed=2)])
    importance = randn(512, seed=3).square()
    for column in (None, importance):
        _same_bytes(weight, name, column, monkeypatch)


def _same_bytes(weight, name, importance, monkeypatch):
    want = quantize(weight, name, importance)
    for threads, chunk in ((1, 11 * 256), (3, 7 * 256), (2, 40 * 256)):
        monkeypatch.setattr(type(FORMATS[name]), "encode_chunk", chunk)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(quantize(weight, name, importance), want)
            with torch.inference_mode():
                assert torch.equal(quantize(weight.clone(), name, importance), want)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    rows = torch.stack([quantize(row, name, importance) for row in weight[::9]])
    assert torch.equal(rows, want[::9])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_strides_and_dtypes(name):
    weight = randn(6, 512, seed=4)
    want = quantize(weight, name)
    assert want.shape == (6, FORMATS[name].row_bytes(512))
    assert torch.equal(quantize(weight.view(3, 2, 512), name).view(6, -1), want)
    assert torch.equal(quantize(weight.t().contiguous().t(), name), want)
    assert torch.equal(quantize(weight.double().requires_grad_(), name), want)
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype)
        assert torch.equal(quantize(low, name), quantize(low.float(), name))
    assert quantize(weight[:0], name).shape == (0, want.shape[1])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_equals_the_cpu(name):
    weight = torch.cat([planted(), randn(64, 512, seed=5)])
    for importance in (None, randn(512, seed=6).square()):
        got = quantize(weight.cuda(), name, importance)
        assert torch.equal(got.cpu(), quantize(weight, name, importance))


def test_half_above_is_the_next_float16_away_from_zero():
    values = torch.cat([randn(2000, seed=21) * torch.logspace(-9, 4, 2000), torch.zeros(1)])
    values = torch.cat([values, values.half().float()])
    half = base.half_above(values)
    assert half.isfinite().all()
    assert (half.float() * values >= 0).all()
    assert (half.float().abs() >= values.abs()).all()
    below = (
        torch.where(half == 0, 0, half.view(torch.int16) - 1).to(torch.int16).view(torch.float16)
    )
    assert (below.float().abs()[half != 0] < values.abs()[half != 0]).all()


@pytest.mark.parametrize("shape", [(32, 1), (8, 1, 1), (32, 2), (16, 3, 5), (32, 3, 257), (1, 4)])
def test_sums_run_from_first_to_last(shape):
    terms = randn(*shape, seed=20) * torch.logspace(0, 6, shape[0]).view(-1, *[1] * len(shape[1:]))
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    assert torch.equal(ordered_sum(terms), total)
    assert torch.equal(ordered_sum(terms.transpose(0, -1).contiguous().transpose(0, -1)), total)


# ---- errors of the round trip


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
    # 1/15 of the range is the coarsest step; the peak's own rounding comes on top.
    assert ((got - weight).abs() <= 0.15 * weight.abs().max()).all()


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
    ranges = {"Q4_K": 0.1, "Q5_K": 0.1, "Q6_K": 0.1}  # their group scales share one float16
    assert others.abs().max() <= ranges.get(name, 0.01)


def test_more_bits_err_less():
    weight = randn(64, 512, seed=9)
    errors = [rmse(weight, name) for name in ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K")]
    assert errors == sorted(errors)
    assert rmse(weight, "Q4_K") < rmse(weight, "Q4_1") < rmse(weight, "Q4_0")


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


# ---- what is refused


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_weights_are_counted(name, monkeypatch):
    monkeypatch.setattr(type(FORMATS[name]), "encode_chunk", 1024)
    weight = randn(8, 512, seed=11)
    weight[2, 5] = weight[7, 511] = float("nan")
    weight[3, 0] = -torch.inf
    with pytest.raises(OpError, match=f"{name} .*3 non-finite weights of 4096"):
        quantize(weight, name)
    torch.set_num_threads(2)
    try:
        with pytest.raises(OpError, match="3 non-finite weights of 4096"):
            quantize(weight, name)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["F16", "BF16", *PACKED])
def test_weights_too_large_for_the_format_are_refused(name):
    weight = randn(2, 256, seed=12)
    weight[1, 3] = 3.4e38
    with pytest.raises(OpError, match="too large"):
        quantize(weight, name)
    assert round_trip(weight, "F32").equal(weight)


@pytest.mark.parametrize(("name", "k"), [("Q8_0", 100), ("Q4_K", 128), ("Q6_K", 4600)])
def test_rows_that_blocks_do_not_fill_are_refused(name, k):
    with pytest.raises(OpError, match=f"a row of {k}"):
        quantize(torch.zeros(2, k), name)


def test_other_misuse_is_refused():
    with pytest.raises(OpError, match=r"torch\.int8"):
        quantize(torch.zeros(2, 256, dtype=torch.int8), "Q4_K")
    with pytest.raises(OpError, match="know no importance"):
        quantize(torch.zeros(2, 256), "Q4_K", torch.ones(256), as_ggml=True)
    with pytest.raises(OpError, match="at least one dimension"):
        quantize(torch.tensor(1.0), "F32")
    for importance in (torch.ones(128), torch.ones(2, 256)):
        with pytest.raises(OpError, match="one value a column"):
            quantize(torch.zeros(2, 256), "Q4_K", importance)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OpError, match="finite"):
            quantize(torch.zeros(2, 256), "Q4_K", torch.full((256,), value))


@pytest.mark.parametrize("name", FLOATS)
def test_unused_importance_is_said_once(name, caplog):
    base._warn_unused.cache_clear()
    weight = randn(2, 256, seed=13)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(quantize(weight, name, torch.rand(256)), quantize(weight, name))
    assert [record.getMessage().count(name) for record in caplog.records] == [1]
