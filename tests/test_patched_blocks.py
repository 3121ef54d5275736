"""A quantized weight that is changed a little: a LoRA baked in by the host is not rounded away."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.ops.blocks import PACKED, dequantize, quantize
from ideogram4_quant.ops.layouts import gguf_tensor
from ideogram4_quant.ops.layouts.patched import change_blocks
from ideogram4_quant.tests.layout_cases import FOLDED_GGUF, GGUF, SMOOTH
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
N, K, RANK = 96, 512, 4


def low_rank(weight, strength, rank=RANK):
    change = randn(N, rank, seed=1) @ randn(rank, K, seed=2)
    return change * (strength * weight.norm() / change.norm())


def kept(found, change):
    """How much of the change is in what was found: 1 for all of it."""
    return ((found * change).sum() / change.square().sum()).item()


def bake(quantized, change):
    """As the host does, with its seed: on values in fp32."""
    values = quantized.dequantize() + change
    return quantized.requantize_from_float(values, scale="recalculate", stochastic_rounding=11)


@pytest.mark.parametrize("qtype", PACKED)
@pytest.mark.parametrize("strength", [0.01, 0.03, 0.1, 0.3])
def test_a_baked_lora_is_kept(qtype, strength):
    weight = randn(N, K) * 0.02
    quantized = QuantizedTensor.from_float(weight, GGUF, qtype=qtype)
    before = quantized.dequantize()
    change = low_rank(before, strength)
    baked = bake(quantized, change)
    assert baked._params.qtype == qtype
    assert baked._qdata.shape == quantized._qdata.shape
    found = baked.dequantize() - before
    assert kept(found, change) > (0.7 if qtype == "Q2_K" else 0.9)
    # what the update reads, and inputs like any other: no more noise than encoding adds anyhow
    x = change[:RANK]
    along = relative((baked.dequantize() - before) @ x.T, change @ x.T)
    assert along < {"Q2_K": 0.45, "Q3_K": 0.2}.get(qtype, 0.13)
    assert relative(baked.dequantize(), before + change) < 1.05 * relative(before, weight) + 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_the_weight_s_dtype_is_no_change(dtype):
    data = quantize(randn(N, K) * 0.02, "Q4_K")
    quantized = gguf_tensor(data, "Q4_K", (N, K), dtype=dtype)
    values = quantized.dequantize()
    assert torch.equal(quantized.requantize_from_float(values)._qdata, data)
    values[5] += 0.3
    again = quantized.requantize_from_float(values)._qdata
    assert torch.equal(again[:5], data[:5])
    assert torch.equal(again[6:], data[6:])
    assert relative(dequantize(again[5], "Q4_K", (K,)), values[5].float()) < 0.05


@pytest.mark.parametrize("qtype", PACKED)
def test_an_unchanged_weight_keeps_its_bytes(qtype):
    quantized = QuantizedTensor.from_float(randn(N, K), GGUF, qtype=qtype)
    assert torch.equal(bake(quantized, torch.zeros(N, K))._qdata, quantized._qdata)


def test_a_folded_weight_keeps_it_too():
    weight = randn(N, K) * 0.02
    options = {"fold_smooth": SMOOTH, "qtype": "Q4_K"}
    quantized = QuantizedTensor.from_float(weight, FOLDED_GGUF, **options)
    before = quantized.dequantize()
    change = low_rank(before, 0.02)
    # the directions are those of the folded weight, by whose columns errors are weighed
    assert kept(bake(quantized, change).dequantize() - before, change) > 0.7


def test_in_place_and_through_row_slices():
    weight = randn(N, K) * 0.02
    quantized = QuantizedTensor.from_float(weight, GGUF, qtype="IQ4_XS")
    whole = gguf_tensor(quantized._qdata, "IQ4_XS", (N, K), dtype=torch.float32)
    before = whole.dequantize()
    change = low_rank(before, 0.02)
    whole.narrow(0, 32, 32).add_(change[32:64])
    found = whole.dequantize() - before
    assert not found[:32].any()
    assert not found[64:].any()
    assert kept(found[32:64], change[32:64]) > 0.9


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_K", "MXFP4"])
def test_a_change_in_all_directions_costs_no_more_than_encoding_does(qtype):
    data = quantize(randn(N, K) * 0.02, qtype)
    before = dequantize(data, qtype, (N, K))
    wanted = before + 0.05 * 0.02 * randn(N, K, seed=3)
    found = dequantize(change_blocks(wanted, data, qtype), qtype, (N, K))
    assert relative(found, wanted) < 0.12


def test_the_bytes_are_the_same_every_time_and_whatever_the_chunks(monkeypatch):
    from ideogram4_quant.ops.layouts import patched

    data = quantize(randn(N, K) * 0.02, "Q4_K")
    before = dequantize(data, "Q4_K", (N, K))
    wanted = before + low_rank(before, 0.02)
    once = change_blocks(wanted, data, "Q4_K")
    assert torch.equal(change_blocks(wanted, data, "Q4_K"), once)
    monkeypatch.setattr(patched, "FED_BACK", 7 * K)
    monkeypatch.setattr(patched, "row_chunks", partial(patched.row_chunks, values=5 * K))
    other = dequantize(change_blocks(wanted, data, "Q4_K"), "Q4_K", (N, K))
    assert kept(other - before, wanted - before) > 0.9


def test_no_rows():
    nothing = torch.zeros(0, 144, dtype=torch.uint8)
    assert change_blocks(torch.zeros(0, 256), nothing, "Q4_K").shape == (0, 144)
