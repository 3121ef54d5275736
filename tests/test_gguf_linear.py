"""GGUF linears: through int8 and decoded, and which of the two ``auto`` takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ideogram4_quant.ops import (
    blocks,
    linear,
    prequantized,
    reference,
)
from ideogram4_quant.ops.gguf_compute import FEW_TOKENS, resolve_compute
from ideogram4_quant.ops.linear import gguf_linear
from ideogram4_quant.tests.linear_cases import EPS
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)


@pytest.mark.parametrize("qtype", list(blocks.FORMATS))
@pytest.mark.parametrize("compute", ["w8a8", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_linear_is_near_the_decoded_weight(qtype, compute, dtype):
    x, bias = randn(5, 512, dtype=dtype), randn(33, seed=2)
    packed = blocks.quantize(randn(33, 512, seed=1), qtype)
    dense = blocks.dequantize(packed, qtype, (33, 512))
    got = gguf_linear(x, packed, qtype, (33, 512), bias, compute=compute)
    want = F.linear(x.float(), dense, bias)
    assert relative(got, want) < {"w8a8": 0.014, "dense": 1e-6}[compute] + EPS[dtype] / 2
    if dtype == torch.float32:
        plain = reference.gguf_linear(x, packed, qtype, (33, 512), bias, compute=compute)
        assert torch.allclose(got, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("qtype", "k", "want"),
    [
        ("Q4_K", 256, "w8a8"),
        ("Q5_K", 512, "w8a8"),
        ("Q4_0", 256, "w8a8"),
        ("Q5_1", 768, "w8a8"),
        ("Q4_0", 128, "dense"),
        ("Q8_0", 256, "dense"),
        ("Q6_K", 256, "dense"),
        ("BF16", 256, "dense"),
        ("F32", 7, "dense"),
    ],
)
def test_auto_takes_int8_for_four_and_five_bits(qtype, k, want):
    assert resolve_compute("auto", qtype, k) == want
    packed = blocks.quantize(randn(6, k), qtype)
    for tokens, chosen in ((FEW_TOKENS, want), (FEW_TOKENS - 1, "dense")):
        x = randn(tokens, k, seed=1)
        auto = gguf_linear(x, packed, qtype, (6, k))
        assert torch.equal(auto, gguf_linear(x, packed, qtype, (6, k), compute=chosen))


@pytest.mark.parametrize("compute", ["w8a8", "dense"])
def test_gguf_weights_decoded_a_few_rows_at_a_time(compute, monkeypatch):
    x, bias = randn(4, 256), randn(37, seed=2)
    packed = blocks.quantize(randn(37, 256, seed=1), "Q4_K")
    want = gguf_linear(x, packed, "Q4_K", (37, 256), bias, compute=compute)
    monkeypatch.setattr(prequantized, "MULTIPLIED", 1000)
    monkeypatch.setattr(linear, "MULTIPLIED", 1000)
    got = gguf_linear(x, packed, "Q4_K", (37, 256), bias, compute=compute)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(reference, "CACHED", 1000)
    q, scale = reference.dequantize_rotate_quantize(packed, "Q4_K", (37, 256), 256)
    monkeypatch.undo()
    whole = reference.dequantize_rotate_quantize(packed, "Q4_K", (37, 256), 256)
    assert torch.equal(q, whole[0])
    assert torch.equal(scale, whole[1])


@pytest.mark.parametrize(("k", "group"), [(512, 256), (64, 64), (48, 16), (32, 16)])
def test_explicit_int8_takes_the_largest_rotation(k, group):
    packed = blocks.quantize(randn(6, k * 2), "F16")[:, : 2 * k].contiguous()
    x = randn(3, k, seed=1)
    got = gguf_linear(x, packed, "F16", (6, k), compute="w8a8")
    want = gguf_linear(x, packed, "F16", (6, k), compute="w8a8", rotation=group)
    assert torch.equal(got, want)
