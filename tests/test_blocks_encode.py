"""Block encoding: bytes against gguf-py, determinism, and what is refused.

Errors of the round trip are in test_blocks_round_trip.py; bytes as ggml's, and errors below its
own, are held to its C code in test_blocks_ggml.py.
"""

from __future__ import annotations

import logging

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize as gguf_quantize

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.blocks import FORMATS, base, dequantize, quantize
from ideogram4_quant.ops.blocks.search import ordered_sum
from ideogram4_quant.tests.block_cases import FLOATS, NAMES, PACKED, SIMPLE, planted, round_trip
from ideogram4_quant.tests.tensors import randn

torch.set_num_threads(1)


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


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "planted"])
def test_an_mxfp4_block_has_at_most_the_error_of_gguf_pys(kind):
    weight = planted() if kind == "planted" else randn(64, 512, seed=1) * 0.02
    weight = weight * weight.abs() if kind == "heavy-tailed" else weight
    theirs = gguf_quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    ours, theirs = (
        (dequantize(data, "MXFP4", weight.shape) - weight).view(-1, 32).square().sum(1)
        for data in (quantize(weight, "MXFP4"), torch.from_numpy(theirs))
    )
    assert (ours <= theirs * (1 + 1e-6)).all()
    if kind != "planted":
        assert ours.sum() < 0.98 * theirs.sum()


def test_what_mxfp4_can_say_is_kept():
    places = torch.arange(32) % 16
    data = torch.stack([torch.full((32,), e) for e in (0, 1, 2, 100, 127, 250)]).to(torch.uint8)
    packed = (places[:16] | places[16:] << 4).to(torch.uint8).expand(6, 16)
    data = torch.cat([data[:, :1], packed], 1)
    weight = dequantize(data, "MXFP4", (6, 32))
    assert torch.equal(round_trip(weight, "MXFP4"), weight)


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
    for name in ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"):
        with pytest.raises(OpError, match=f"{name} bytes as ggml's are not made"):
            quantize(torch.zeros(2, 256), name, as_ggml=True)
    with pytest.raises(OpError, match="at least one dimension"):
        quantize(torch.tensor(1.0), "F32")
    for importance in (torch.ones(128), torch.ones(2, 256)):
        with pytest.raises(OpError, match="one value a column"):
            quantize(torch.zeros(2, 256), "Q4_K", importance)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OpError, match="finite"):
            quantize(torch.zeros(2, 256), "Q4_K", torch.full((256,), value))


@pytest.mark.parametrize("name", [*FLOATS, "MXFP4"])
def test_unused_importance_is_said_once(name, caplog):
    base._warn_unused.cache_clear()
    weight = randn(2, 256, seed=13)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(quantize(weight, name, torch.rand(256)), quantize(weight, name))
    assert [record.getMessage().count(name) for record in caplog.records] == [1]
