"""Files as convert_to_quant 1.3.4 describes them, which says more than ComfyUI does.

Found in real files of it; made anew here by comfy-kitchen or by formulas, without its package.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.grammar import build_entries, parse_key
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.tensors import randn

NAME = "layers.2.feed_forward.w1"
SAID = {"orig_dtype": "torch.bfloat16"}
BLOCK = {"NVFP4": 16, "MXFP8": 32}


def described(format_: str, shape, **more) -> torch.Tensor:
    return storage.as_json({"format": format_, **SAID, "orig_shape": list(shape), **more})


def microscaled(weight: torch.Tensor, level: str, **more):
    """comfy-kitchen's parts under the description that convert_to_quant gives them; the values."""
    parts, values = storage.pack_stock(weight, level)
    said = {"group_size": BLOCK[level], **more}
    parts["comfy_quant"] = described(level.lower(), weight.shape, **said)
    return parts, values[: weight.shape[0], : weight.shape[1]]


def entry(path, stored: dict, module: str = NAME):
    save_file({f"{module}.{key}": value.contiguous() for key, value in stored.items()}, path)
    found = open_tensor_files(path).tensors
    built = build_entries([(parse_key(name), raw) for name, raw in found.items()], {})
    built.check()
    return built.entries[f"{module}.weight"]


@pytest.mark.parametrize("shape", [(128, 768), (100, 72)])
@pytest.mark.parametrize("level", BLOCK)
def test_group_size_and_the_shape_without_padding(level, shape, tmp_path):
    parts, values = microscaled(randn(*shape), level)
    found = entry(tmp_path / "m.safetensors", parts)
    assert (found.level, found.shape) == (level, shape)
    assert torch.equal(found.read(torch.float32).dequantize(), values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 64}, "with group_size 64"),
        ({"orig_shape": [128, 384]}, "another orig_shape"),
        ({"orig_shape": [16, 768]}, "another orig_shape"),
        ({"orig_shape": [128, True]}, "another orig_shape"),
        ({"orig_shape": "[128, 768]"}, "another orig_shape"),
        ({"orig_shape": [1 << 70, -1]}, "another orig_shape"),
    ],
)
@pytest.mark.parametrize("level", BLOCK)
def test_what_the_tensors_do_not_bear_out(level, change, words, tmp_path):
    parts, _ = storage.pack_stock(randn(128, 768), level)
    said = {"group_size": BLOCK[level], "orig_shape": [128, 768], **change}
    parts["comfy_quant"] = storage.as_json({"format": level.lower(), **said})
    with pytest.raises(CheckpointError, match=words):
        entry(tmp_path / "m.safetensors", parts)


@pytest.mark.parametrize("level", BLOCK)
def test_every_matrix_of_a_model_the_indicator_of_two_rows_too(level, tmp_path):
    state = files.fuse(files.split_model(**files.WIDE))
    stored, truth = {}, {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2:
            stored[name] = truth[name] = tensor
            continue
        parts, truth[name] = microscaled(tensor, level)
        stored |= {f"{module}.{key}": value for key, value in parts.items()}
    opened = open_checkpoint(files.save(tmp_path / "ideogram4_cond.safetensors", stored))
    assert opened.level == level
    found = opened.load("conditional", dtype=torch.float32)
    for name, tensor in truth.items():
        values = found[name].dequantize() if hasattr(found[name], "_qdata") else found[name]
        torch.testing.assert_close(values.float(), tensor, rtol=0, atol=0, msg=name)


def test_hybrid_mxfp8_is_mxfp8(tmp_path):
    """One scale for all, for cards that multiply FP8: the weights are those of the blocks."""
    parts, values = microscaled(randn(128, 768), "MXFP8")
    parts["comfy_quant"] = described("hybrid_mxfp8", (128, 768), group_size=32)
    parts["weight_scalar"] = torch.tensor(0.25)
    found = entry(tmp_path / "m.safetensors", parts)
    assert found.level == "MXFP8"
    assert torch.equal(found.read(torch.float32).dequantize(), values)
    del parts["weight_scale"]  # beside FP8 of no other scale it is not understood
    parts["comfy_quant"] = described("float8_e4m3fn", (128, 768))
    with pytest.raises(CheckpointError, match="weight_scalar"):
        entry(tmp_path / "m.safetensors", parts)


def blocks(weight: torch.Tensor, rows: int, columns: int, largest: float, dtype: torch.dtype):
    """(codes, scale [a, b], values) of blocks of rows x columns."""
    n, k = weight.shape
    scale = weight.view(n // rows, rows, k // columns, columns).abs().amax((1, 3)) / largest
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    codes = weight / wide
    codes = (codes if dtype.is_floating_point else codes.round()).to(dtype)
    return codes, scale, codes.float() * wide


KINDS = {
    "int8_blockwise": (127.0, torch.int8),
    "float8_e4m3fn_blockwise": (448.0, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("shape", [(384, 128), (128, 384), (128, 128), (256, 384)])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_as_wide_or_as_high_as_the_weight(kind, shape, tmp_path):
    """As input_proj [4608, 128] and final_layer.linear [128, 4608] have them in blocks of 128; a
    single scale is written without dimensions."""
    codes, scale, values = blocks(randn(*shape), 128, 128, *KINDS[kind])
    stored = {
        "weight": codes,
        "weight_scale": scale.reshape(()) if scale.numel() == 1 else scale,
        "comfy_quant": storage.as_json({"format": kind, **SAID, "group_size": 128}),
    }
    weight = entry(tmp_path / "m.safetensors", stored).read(torch.float32)
    assert torch.equal(weight.dequantize(), values)


def test_scales_a_row_where_blocks_do_not_fit(tmp_path):
    """It says the size of the blocks there, too."""
    codes, scale, values = blocks(randn(100, 72), 1, 72, *KINDS["float8_e4m3fn_blockwise"])
    said = {"format": "float8_e4m3fn_blockwise", **SAID, "group_size": 64}
    stored = {
        "weight": codes,
        "weight_scale": scale.flatten(),
        "comfy_quant": storage.as_json(said),
    }
    weight = entry(tmp_path / "m.safetensors", stored).read(torch.float32)
    assert torch.equal(weight.dequantize(), values)
