"""The host's 4-, 6- and 8-bit containers: comfy-kitchen's values to the bit, and the products."""

from __future__ import annotations

import dataclasses

import comfy_kitchen
import comfy_kitchen.tensor as kitchen
import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import grouped, kitchen_ops
from ideogram4_quant.ops.layouts import (
    Weight,
    awq_tensor,
    mxfp8_tensor,
    nvfp4_tensor,
    packed,
    w4a4_tensor,
    w4a8_tensor,
)
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
CODEBOOK = torch.linspace(-1, 1, 16)
N, K = 48, 768
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W4A8 = {
    "4 bits": {},
    "groups of 32, fp32 scales": {"group_size": 32, "scale_dtype": torch.float32},
    "no codebook": {"codebook": False},
    "zeros": {"symmetric": False},
    **({"6 bits": {"bits": 6}} if packed.SIX_BITS else {}),
}


def outliers(n: int = N, k: int = K) -> torch.Tensor:
    weight = randn(n, k)
    weight[3] = 0
    weight[5, 17] = 60
    weight[:, 99] *= 30
    return weight


def w4a8(weight, dtype, **options):
    """(comfy-kitchen's tensor, ours) of one set of stored parts."""
    data, params = kitchen.AsymW4A8Int8Layout.quantize(weight, **options)
    params = dataclasses.replace(params, orig_dtype=dtype)
    ours = w4a8_tensor(
        data,
        params.scale,
        params.s_channel,
        dtype=dtype,
        group_size=params.group_size,
        codebook=params.codebook,
        correction=params.correction,
    )
    return QuantizedTensor(data, "AsymW4A8Int8Layout", params), ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", W4A8)
def test_w4a8_is_comfy_kitchens_to_the_bit(kind, dtype):
    stock, ours = w4a8(outliers(), dtype, **W4A8[kind])
    assert torch.equal(ours.dequantize(), stock.dequantize())
    assert isinstance(ours.layout_cls(), kitchen.AsymW4A8Int8Layout)


@pytest.mark.parametrize("kind", W4A8)
def test_the_grid_is_the_formula(kind):
    """Codes by hand, one at a time, and comfy-kitchen's own decoding of the whole."""
    stock, ours = w4a8(outliers(), torch.float32, **W4A8[kind])
    params, group = ours._params, ours._params.group_size
    grid = grouped.int8_grid(ours._qdata, params.scale, params.codebook, group)
    for row, column in ((0, 0), (5, 17), (7, 18), (N - 1, K - 1)):
        byte = int(ours._qdata[row, column // 2]) & 255
        code = byte >> 4 if column % 2 else byte & 15
        if params.bits == 6:
            high = int(ours._qdata[row, K // 2 + column // 4]) & 255
            code |= (high >> 2 * (column % 4) & 3) << 4
        centre = 32 if params.bits == 6 else 8
        level = code - centre if params.codebook is None else float(params.codebook[code])
        scale = float(params.scale[row, column // group].float())
        assert int(grid[row, column]) == max(-127, min(127, round(level * scale)))
    if params.correction is None:
        rotated = rotate(grid.float() * params.s_channel[:, None], 256)
        assert relative(rotated, stock.dequantize()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", W4A8)
def test_w4a8_products(kind, dtype):
    """The int8 product of the rotated rows: exact but for the rounding of the activations."""
    _, ours = w4a8(outliers(), dtype, **W4A8[kind])
    x, bias = randn(2, 5, K, seed=1).to(dtype), randn(N, seed=2).to(dtype)
    dense = ours.to(torch.float32).dequantize()
    wanted = torch.nn.functional.linear(x.float(), dense, bias.float())
    found = linear(x, ours, bias)
    assert found.dtype == dtype
    assert relative(found.float(), wanted) < 0.012
    assert torch.equal(torch.nn.functional.linear(x, ours, bias), found)
    if kind == "zeros":  # dense: with values, in the dtype of x
        assert relative(found.float(), wanted) < 0.006


def test_w4a8_rows_are_those_of_an_int8_weight():
    """The grid as an INT8 weight gives the same product, to the bit."""
    from ideogram4_quant.ops.layouts import int8_tensor

    _, ours = w4a8(outliers(), torch.float32)
    params = ours._params
    grid = grouped.int8_grid(ours._qdata, params.scale, params.codebook, 16)
    int8 = int8_tensor(grid, params.s_channel, dtype=torch.float32, rotation=256)
    x = randn(33, K, seed=4)
    for backend in ("reference", "auto"):
        options = LinearOptions(backend=backend)
        assert torch.equal(linear(x, ours, None, options), linear(x, int8, None, options))


@pytest.mark.skipif(packed.SIX_BITS is False, reason="comfy-kitchen makes no 6-bit codes")
def test_six_bits_without_comfy_kitchens_help(monkeypatch):
    stock, ours = w4a8(outliers(), torch.float32, bits=6)
    theirs = relative(stock.dequantize(), outliers())
    monkeypatch.setattr(packed, "SIX_BITS", False)
    assert relative(ours.dequantize(), stock.dequantize()) < 1e-6
    data, params = packed.W4A8Layout.quantize(outliers(), bits=6)
    assert params.bits == 6
    made = kitchen.AsymW4A8Int8Layout.dequantize(data, params)  # as 0.2.40 reads it
    assert relative(made, outliers()) < 1.3 * theirs
    draws = [
        packed.W4A8Layout.dequantize(
            *packed.W4A8Layout.quantize(outliers(), bits=6, stochastic_rounding=seed)
        )
        for seed in range(1, 33)
    ]
    assert relative(torch.stack(draws).mean(0), outliers()) < relative(made, outliers()) / 1.7


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a4_is_comfy_kitchens_to_the_bit(dtype):
    data, params = kitchen.TensorCoreConvRotW4A4Layout.quantize(outliers())
    params = dataclasses.replace(params, orig_dtype=dtype)
    stock = QuantizedTensor(data, "TensorCoreConvRotW4A4Layout", params)
    ours = w4a4_tensor(data, params.scale, dtype=dtype)
    assert torch.equal(ours.dequantize(), stock.dequantize())
    x = randn(7, K, seed=1).to(dtype)
    wanted = x.float() @ ours.float().dequantize().t()
    assert relative(linear(x, ours).float(), wanted) < 0.012  # int8 rows, where stock has int4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 768), (100, 528), (4, 40)])
def test_nvfp4_and_mxfp8_are_comfy_kitchens_to_the_bit(shape, dtype):
    weight = randn(*shape) * 3
    x, bias = randn(2, 3, shape[1], seed=1).to(dtype), randn(shape[0], seed=2)
    for layout in (kitchen.TensorCoreNVFP4Layout, kitchen.TensorCoreMXFP8Layout):
        data, params = layout.quantize(weight)
        params = dataclasses.replace(params, orig_dtype=dtype)
        stock = QuantizedTensor(data, layout.__name__, params)
        if layout is kitchen.TensorCoreNVFP4Layout:
            ours = nvfp4_tensor(data, params.block_scale, params.scale, shape, dtype=dtype)
        else:
            ours = mxfp8_tensor(data, params.scale, shape, dtype=dtype)
        assert torch.equal(ours.dequantize(), stock.dequantize())
        wanted = torch.nn.functional.linear(x.float(), ours.dequantize().float(), bias)
        assert relative(linear(x, ours, bias).float(), wanted) < 0.006


def test_nvfp4_where_the_device_multiplies_it(monkeypatch):
    """Activations in NVFP4 too, by comfy-kitchen's product, which a CPU lacks: here its formula."""

    def product(a, b, tensor_scale_a, tensor_scale_b, block_scale_a, block_scale_b, **_):
        left = comfy_kitchen.dequantize_nvfp4(a, tensor_scale_a, block_scale_a, torch.float32)
        right = comfy_kitchen.dequantize_nvfp4(b, tensor_scale_b, block_scale_b, torch.float32)
        return left @ right.t()

    monkeypatch.setattr(comfy_kitchen, "scaled_mm_nvfp4", product)
    weight, x, bias = randn(48, 768), randn(2, 5, 768, seed=1), randn(48, seed=2)
    data, params = kitchen.TensorCoreNVFP4Layout.quantize(weight)
    ours = nvfp4_tensor(data, params.block_scale, params.scale, (48, 768), dtype=torch.float32)
    monkeypatch.setattr(ours.layout_cls, "native", classmethod(lambda *_: True))
    rows = QuantizedTensor.from_float(x.reshape(10, 768), "TensorCoreNVFP4Layout").dequantize()
    wanted = torch.nn.functional.linear(rows.view(2, 5, 768), ours.dequantize(), bias)
    assert relative(linear(x, ours, bias), wanted) < 0.006


def test_awq_is_its_formula():
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(0))
    scale, zeros = randn(K // 64, N).abs() * 0.02, randn(K // 64, N, seed=1) * 0.1
    wanted = (codes - 8) * scale.repeat_interleave(64, 0).t() + zeros.repeat_interleave(64, 0).t()
    data = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    ours = awq_tensor(data, scale, zeros, dtype=torch.float32)
    assert relative(ours.dequantize(), wanted) < 1e-6
    x = randn(5, K, seed=3)
    assert relative(linear(x, ours), x @ wanted.t()) < 1e-5
    params = kitchen.TensorCoreAWQW4A16Layout.Params(
        scale=scale, zeros=zeros, orig_dtype=torch.float32, orig_shape=(N, K)
    )
    stock = QuantizedTensor(data, "TensorCoreAWQW4A16Layout", params)
    assert torch.equal(ours.dequantize(), stock.dequantize())


@pytest.mark.parametrize("bits", [4, 6])
def test_the_host_packs_w4a8_for_few_tokens(bits):
    """What ``optimize_for_gemv`` leaves on a card: codes and scales in the order of its kernel."""
    codec = pytest.importorskip("comfy_kitchen.tensor.w4a8_packed")
    n, k = 32, 512
    generator = torch.Generator().manual_seed(0)
    size = n * k * codec.w4a8_mma_record_bytes(bits) // 512
    records = torch.randint(0, 120, (size,), generator=generator).to(torch.int8)  # no NaN scales
    data, s_rel = codec.unpack_w4a8_mma_weight(records, n, k)
    parts = (torch.rand(n, generator=generator) + 0.5, CODEBOOK if bits == 4 else None)
    canonical = w4a8_tensor(data, s_rel, parts[0], dtype=torch.float32, codebook=parts[1])
    params = dataclasses.replace(canonical._params, scale=s_rel.new_empty(0), mma_packed=True)
    weight = Weight(records, canonical._layout_cls, params)
    assert torch.equal(weight.dequantize(), canonical.dequantize())
    assert type(weight[:8]) is torch.Tensor  # not cut out of the records, and right all the same
    assert torch.equal(weight[:8], canonical.dequantize()[:8])
    x = randn(3, k, seed=1)
    wanted = x @ canonical.dequantize().t()
    assert relative(linear(x, weight), wanted) < 0.012


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"s_rel": lambda t: t[:, :-1]}, "no code width"),
        ({"s_rel": lambda t: t.half()}, "group scales"),
        ({"s_rel": lambda t: t.float() * torch.nan}, "NaN"),
        ({"s_channel": lambda t: t[:-1]}, "s_channel"),
        ({"s_channel": lambda t: t * torch.inf}, "NaN or infinity"),
        ({"codebook": lambda t: t[:-1]}, "codebook"),
        ({"packed": lambda t: t.float()}, "int8 matrix"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, match):
    data, params = kitchen.AsymW4A8Int8Layout.quantize(randn(N, K))
    parts = {
        "packed": data,
        "s_rel": params.scale,
        "s_channel": params.s_channel,
        "codebook": params.codebook,
    }
    name, function = next(iter(change.items()))
    parts[name] = function(parts[name])
    with pytest.raises(OpError, match=match):
        w4a8_tensor(**parts, dtype=torch.float32)


def test_where_comfy_kitchens_kernels_are_taken(monkeypatch):
    """By the backend that INT8 weights run on; int4 activations only where there are int4 units."""
    device = torch.device("cuda", 0)
    taken = type("Backend", (), {"name": "comfy_kitchen"})
    monkeypatch.setattr(kitchen_ops.dispatch, "choose", lambda *_, **__: taken)
    ops = {"w4a8_int8_linear", "convrot_w4a4_linear"}
    monkeypatch.setattr(kitchen_ops, "_capabilities", lambda: ops)
    for capability, int4 in (((7, 5), True), ((8, 6), True), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert kitchen_ops.chosen("w4a8_int8_linear", (8, N, K), device, "auto")
        assert kitchen_ops.chosen("convrot_w4a4_linear", (8, N, K), device, "auto") == int4
    assert not kitchen_ops.chosen("w4a8_int8_linear", (8, N, K), torch.device("cpu"), "auto")
    taken.name = "triton"
    assert not kitchen_ops.chosen("w4a8_int8_linear", (8, N, K), device, "auto")
