"""Files in the host's 4-, 6- and 8-bit containers, made by comfy-kitchen, at the model's widths."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.grammar import build_entries, parse_key
from ideogram4_quant.checkpoint.statements import check_heeded
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.ops.layouts import Weight, packed
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.tensors import randn

torch.set_num_threads(1)
LEVELS = [level for level in storage.STOCK if level != "W6A8" or packed.SIX_BITS]
PACKED = [level for level in LEVELS if level in ("W4A8", "W6A8", "INT4 W4A4")]
NAME = "layers.3.feed_forward.w2"
PREFIX = "model.diffusion_model."


def entry(path, stored: dict, module: str = NAME):
    """The weight of ``module`` in a file of one linear, or of three (q, k, v)."""
    save_file({PREFIX + name: value for name, value in stored.items()}, path)
    found = open_tensor_files(path).tensors
    keys = [(parse_key(name), raw) for name, raw in found.items()]
    assert all(key is not None for key, _ in keys)
    return build_entries(keys, {}).entries[f"{module}.weight"]


def beside(parts: dict, module: str = NAME) -> dict:
    return {f"{module}.{suffix}": value for suffix, value in parts.items()}


@pytest.mark.parametrize("k", [4608, 12288])
@pytest.mark.parametrize("level", LEVELS)
def test_comfy_kitchens_values_to_the_bit(level, k, tmp_path):
    parts, values = storage.pack_stock(randn(128, k) * 0.02, level)
    found = entry(tmp_path / "m.safetensors", beside(parts))
    assert found.level == level
    assert found.shape == (128, k)
    weight = found.read(torch.float32)
    assert isinstance(weight, Weight)
    assert torch.equal(weight.dequantize(), values)


@pytest.mark.parametrize("level", LEVELS)
def test_q_k_and_v_stored_apart(level, tmp_path):
    """Joined as they are, but for NVFP4, whose pieces have a scale each."""
    stored, values = {}, []
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        parts, value = storage.pack_stock(randn(128, 768, seed=number), level)
        stored |= beside(parts, f"layers.3.attention.{name}")
        values.append(value)
    found = entry(tmp_path / "m.safetensors", stored, "layers.3.attention.qkv")
    weight = found.read(torch.float32)
    assert isinstance(weight, Weight) == (level != "NVFP4")
    dense = weight.dequantize() if isinstance(weight, Weight) else weight
    assert torch.equal(dense, torch.cat(values))


def test_nvfp4_pieces_of_one_scale_are_joined(tmp_path):
    weight = randn(384, 768)
    stored, values = {}, []
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        piece = weight[128 * number : 128 * (number + 1)].clone()
        piece[0, 0] = 5  # the largest of each
        parts, value = storage.pack_stock(piece, "NVFP4")
        stored |= beside(parts, f"layers.3.attention.{name}")
        values.append(value)
    found = entry(tmp_path / "m.safetensors", stored, "layers.3.attention.qkv")
    assert torch.equal(found.read(torch.float32).dequantize(), torch.cat(values))


def test_asymmetric_w4a8(tmp_path):
    layout = storage.get_layout_class("AsymW4A8Int8Layout")
    data, params = layout.quantize(randn(64, 768), symmetric=False)
    parts = {
        f"weight{suffix}": value.contiguous()
        for suffix, value in layout.state_dict_tensors(data, params).items()
    }
    said = {"format": "asym_w4a8_int8", "params": {"group_size": 16, "convrot_groupsize": 256}}
    values = layout.dequantize(data, params)
    found = entry(
        tmp_path / "m.safetensors", beside(parts | {"comfy_quant": storage.as_json(said)})
    )
    assert torch.equal(found.read(torch.float32).dequantize(), values)
    zeros = parts.pop("weight_correction")
    found = entry(
        tmp_path / "n.safetensors",
        beside(parts | {"weight_zeros": zeros, "comfy_quant": storage.as_json(said)}),
    )
    assert torch.equal(found.read(torch.float32).dequantize(), values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("said", [{"convrot": "true"}, {"quantization": '{"convrot": true}'}])
def test_metadata_that_sum_up_a_rotation(level, said, tmp_path):
    """W4A8, W6A8 and W4A4 are rotated by their format; no other container is."""
    parts, _ = storage.pack_stock(randn(128, 4608) * 0.02, level)
    found = entry(tmp_path / "m.safetensors", beside(parts))
    files = dataclasses.replace(open_tensor_files(tmp_path / "m.safetensors"), metadata=said)
    if level in ("W4A8", "W6A8", "INT4 W4A4"):
        check_heeded(files, [found], None)
    else:
        with pytest.raises(CheckpointError, match="convrot"):
            check_heeded(files, [found], None)


def test_awq(tmp_path):
    parts, values = storage.pack_awq(randn(64, 512))
    found = entry(tmp_path / "m.safetensors", beside(parts))
    assert found.level == "AWQ W4A16"
    assert torch.allclose(found.read(torch.float32).dequantize(), values, atol=1e-6)


def _uint8(name):
    return lambda parts: parts.__setitem__(name, parts[name].view(torch.uint8))


@pytest.mark.parametrize(
    ("level", "name"),
    [("NVFP4", "weight_scale"), ("MXFP8", "weight_scale"), ("W4A8", "weight_s_rel")],
)
def test_small_floats_stored_as_bytes(level, name, tmp_path):
    parts, values = storage.pack_stock(randn(128, 768), level)
    _uint8(name)(parts)
    found = entry(tmp_path / "m.safetensors", beside(parts))
    assert torch.equal(found.read(torch.float32).dequantize(), values)


@pytest.mark.parametrize("level", [*PACKED, "NVFP4", "AWQ W4A16"])
def test_codes_stored_as_the_other_kind_of_byte(level, tmp_path):
    """``weight.to(storage_t)`` in ComfyUI's loader wraps around: the same bits."""
    pack = storage.pack_awq if level.startswith("AWQ") else partial(storage.pack_stock, level=level)
    parts, values = pack(randn(128, 768))
    codes = parts["weight"]
    other = torch.uint8 if codes.dtype == torch.int8 else torch.int8
    parts["weight"] = codes.view(other)
    assert torch.equal(parts["weight"].to(codes.dtype), codes)
    weight = entry(tmp_path / "m.safetensors", beside(parts)).read(torch.float32)
    assert weight._qdata.dtype == codes.dtype
    torch.testing.assert_close(weight.dequantize(), values, rtol=0, atol=1e-6)


E4M3 = torch.float8_e4m3fn
BROKEN = [
    ("W4A8", lambda p: p.pop("weight_s_rel"), "asym_w4a8_int8 without its s_rel"),
    ("W4A8", lambda p: p.update(weight_s_rel=p["weight_s_rel"][:, :-1].clone()), "do not fit"),
    ("W4A8", lambda p: p.update(weight=p["weight"].view(E4M3)), "codes of asym_w4a8_int8"),
    ("MXFP8", lambda p: p.update(weight=p["weight"].view(torch.int8)), "codes of mxfp8"),
    ("W4A8", lambda p: p.update(weight_codebook=torch.zeros(15)), "codebook"),
    ("W4A8", lambda p: p.update(weight_s_channel=torch.full((64,), torch.nan)), "NaN"),
    ("W4A8", lambda p: p.update(weight_scale_2=torch.ones(())), "weight_scale_2 beside"),
    ("W4A8", lambda p: _said(p, group_size="16"), "unusable group_size"),
    ("W4A8", lambda p: _said(p, convrot_groupsize=192), "rotation group"),
    ("W4A8", lambda p: _said(p, bits=6), "another number of bits"),
    ("W4A8", lambda p: _said(p, bits="4"), "unusable bits"),
    ("W4A8", lambda p: p.update(weight_s_channel=torch.ones(63)), "s_channel"),
    ("W4A8", lambda p: p.update(weight_zeros=torch.ones(47, 64)), "zeros"),
    ("W4A8", lambda p: p.update(weight_s_rel=p["weight_s_rel"].half()), "another dtype"),
    ("AWQ W4A16", lambda p: p.update(weight_zeros=torch.ones(11, 64)), "weight_zeros"),
    ("AWQ W4A16", lambda p: p.update(weight_scale=torch.ones(64, 12)), "a divisor of 768"),
    ("AWQ W4A16", lambda p: _said(p, group_size=32), "another group_size"),
    ("INT4 W4A4", lambda p: _said(p, linear_dtype="int2"), "linear_dtype 'int2'"),
    ("INT4 W4A4", lambda p: p.update(weight_scale=torch.ones(3)), "weight_scale"),
    ("NVFP4", lambda p: p.pop("weight_scale_2"), "nvfp4 without its scale_2"),
    ("NVFP4", lambda p: p.update(weight_scale=p["weight_scale"][:64].clone()), "block scales"),
    ("NVFP4", lambda p: p.update(weight_scale_2=torch.ones(2)), "scale_2"),
    ("NVFP4", lambda p: p.update(weight=p["weight"][:60].clone()), "codes of another size"),
    ("MXFP8", lambda p: p.update(weight_scale=p["weight_scale"][:, :-4].clone()), "block scales"),
    ("MXFP8", lambda p: p.update(weight_scale=p["weight_scale"][:64].clone()), "block scales"),
    ("MXFP8", lambda p: p.update(weight_scale=p["weight_scale"].float()), "another dtype"),
]


def _said(parts: dict, **changes) -> None:
    said = json.loads(parts["comfy_quant"].numpy().tobytes())
    parts["comfy_quant"] = storage.as_json(said | changes)


@pytest.mark.parametrize(("level", "change", "match"), BROKEN)
def test_what_does_not_fit_is_said_by_the_headers(level, change, match, tmp_path):
    """But for values: a file that opens can be loaded."""
    pack = storage.pack_awq if level == "AWQ W4A16" else partial(storage.pack_stock, level=level)
    parts, _ = pack(randn(64, 768))
    change(parts)
    found = entry(tmp_path / "m.safetensors", beside(parts))
    if match == "NaN":
        found.check()
    with pytest.raises(CheckpointError, match=match) as raised:
        found.read(torch.float32) if match == "NaN" else found.check()
    assert "layers.3.feed_forward.w2" in str(raised.value)
    assert isinstance(raised.value, CorruptFileError) == (
        "linear_dtype" not in match and "beside" not in match
    )


UNDESCRIBED = {
    "W4A8": "asym_w4a8_int8",
    "NVFP4": "nvfp4",
    "MXFP8": "mxfp8",
    "AWQ W4A16": "awq_w4a16",
    "SVDQuant W4A4": "svdquant_w4a4",
}


@pytest.mark.parametrize("level", UNDESCRIBED)
def test_a_weight_whose_description_was_lost_is_named(level, tmp_path):
    """So save tools that know no such format, in which nothing else goes wrong."""
    others = {"AWQ W4A16": storage.pack_awq, "SVDQuant W4A4": storage.pack_svdquant}
    pack = others.get(level) or partial(storage.pack_stock, level=level)
    parts, _ = pack(randn(64, 768))
    del parts["comfy_quant"]
    with pytest.raises(CheckpointError, match=f"{UNDESCRIBED[level]} without its descr") as raised:
        entry(tmp_path / "m.safetensors", beside(parts)).check()
    assert "needed comfy_quant" in str(raised.value)
    assert not isinstance(raised.value, CorruptFileError)  # a download would be the same again


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("level", "bits"), [("W4A8", 4), ("W6A8", 6)])
def test_bits_that_the_codes_bear_out(level, bits, nested, tmp_path):
    if level not in LEVELS:
        pytest.skip("comfy-kitchen before 0.2.40 has no 6-bit codes")
    parts, values = storage.pack_stock(randn(64, 768), level)
    _said(parts, **({"params": {"bits": bits}} if nested else {"bits": bits}))
    found = entry(tmp_path / "m.safetensors", beside(parts))
    assert found.level == level
    assert torch.equal(found.read(torch.float32).dequantize(), values)
