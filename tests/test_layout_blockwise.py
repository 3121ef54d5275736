"""FP8 and int8 with a scale a block, and e5m2: layout, files, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.grammar import build_entries, parse_key
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, OpError
from ideogram4_quant.ops.layouts import FP8Layout, fp8_tensor
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.tests.fixtures_storage import as_json
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)
N, K, ROWS, COLUMNS = 32, 512, 8, 128
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 127.0}
NAME = "layers.2.feed_forward.w1"


def packed(kind: str, rows: int = ROWS, columns: int = COLUMNS):
    """(codes, scale [a, b], values) by hand."""
    weight = randn(N, K)
    weight[:rows] *= 50
    blocks = weight.view(N // rows, rows, K // columns, columns)
    scale = blocks.abs().amax((1, 3)) / LARGEST[kind]
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    codes = weight / wide
    codes = (codes if kind != "I8" else codes.round()).to(DTYPES[kind])
    return codes, scale, codes.float() * wide


def entry(path, stored: dict):
    save_file({f"{NAME}.{suffix}": value for suffix, value in stored.items()}, path)
    found = open_tensor_files(path).tensors
    built = build_entries([(parse_key(name), raw) for name, raw in found.items()], {})
    built.check()
    return built.entries[f"{NAME}.weight"]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_files_with_a_scale_a_block(kind, name, tmp_path):
    codes, scale, values = packed(kind)
    found = entry(tmp_path / "m.safetensors", {"weight": codes, name: scale})
    assert found.level == ("INT8 blockwise" if kind == "I8" else "FP8")
    weight = found.read(torch.float32)
    assert torch.equal(weight.dequantize(), values)
    x, bias = randn(3, K, seed=1), randn(N, seed=2)
    assert relative(linear(x, weight, bias), x @ values.t() + bias) < 1e-5


def test_q_k_and_v_in_blocks_are_joined(tmp_path):
    stored, values = {}, []
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        codes, scale, value = packed("F8_E4M3")
        scale = scale * 2**number
        stored |= {f"layers.2.attention.{name}.weight": codes}
        stored |= {f"layers.2.attention.{name}.weight_scale_inv": scale}
        values.append(value * 2**number)
    path = tmp_path / "m.safetensors"
    save_file(stored, path)
    found = open_tensor_files(path).tensors
    built = build_entries([(parse_key(name), raw) for name, raw in found.items()], {})
    weight = built.entries["layers.2.attention.qkv.weight"].read(torch.float32)
    assert torch.equal(weight.dequantize(), torch.cat(values))


@pytest.mark.parametrize("described", [True, False])
def test_e5m2_of_one_scale(described, tmp_path):
    data = randn(N, K).to(torch.float8_e5m2)
    stored = {"weight": data, "weight_scale": torch.tensor(0.25)}
    if described:
        stored["comfy_quant"] = as_json({"format": "float8_e5m2"})
    found = entry(tmp_path / "m.safetensors", stored)
    assert torch.equal(found.read(torch.float32).dequantize(), data.float() * 0.25)


@pytest.mark.parametrize("kind", DTYPES)
def test_a_changed_weight_keeps_its_blocks(kind):
    codes, scale, values = packed(kind)
    weight = fp8_tensor(codes, scale, dtype=torch.float32)
    weight.mul_(1.5)
    assert weight._qdata.dtype == DTYPES[kind]
    assert weight._params.scale.shape == scale.shape
    bound = {"F8_E4M3": 0.04, "F8_E5M2": 0.07, "I8": 0.01}[kind]
    assert relative(weight.dequantize(), values * 1.5) < bound


def test_rows_that_share_scales_are_not_cut_out():
    codes, scale, values = packed("F8_E4M3")
    weight = fp8_tensor(codes, scale, dtype=torch.float32)
    assert type(weight[3:5]) is torch.Tensor
    assert torch.equal(weight[3:5], values[3:5])
    codes, scale, values = packed("F8_E4M3", rows=1)
    assert torch.equal(fp8_tensor(codes, scale, dtype=torch.float32)[3:5].dequantize(), values[3:5])


def test_blocks_as_wide_as_the_weight():
    codes, scale, values = packed("F8_E4M3", columns=K)
    assert torch.equal(fp8_tensor(codes, scale, dtype=torch.float32).dequantize(), values)


def test_what_does_not_fit():
    codes, _, _ = packed("F8_E4M3")
    with pytest.raises(OpError, match=r"do not fit the FP8 weight"):
        fp8_tensor(codes, torch.ones(5, 4), dtype=torch.float32)
    with pytest.raises(OpError, match="do not fill"):
        FP8Layout.quantize(randn(N, K), blocks=(5, 128))


def test_scales_that_cannot_be_blocks_are_refused_by_name(tmp_path):
    codes, _, _ = packed("I8")
    stored = {"weight": codes, "weight_scale": torch.ones(7, 3)}
    with pytest.raises(CheckpointError, match=f"{NAME}"):
        entry(tmp_path / "m.safetensors", stored)
