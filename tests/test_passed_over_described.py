"""What ``comfy_quant`` says of a weight is used or refused by name, and good files are read."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.levels import read_catalogue, resolve
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights
from ideogram4_quant.tests.fixtures_passed_over import (
    MODULE,
    STEM,
    conf,
    int8_file,
    refused,
    rotated,
)


@pytest.mark.parametrize(
    "more",
    [
        {"hadamard": True},
        {"rotation": 256},
        {"quarot_groupsize": 64},
        {"zero_point": 3},
        {"smoothquant": {"alpha": 0.5}},
        {"group_size": 32},
        {"per_row": True, "params": {"hadamard": 64}},
        {"orig_shape": [128, 60]},
        {"transposed": True},
    ],
)
def test_more_in_a_description_than_is_understood(tmp_path, more):
    word = "hadamard" if "params" in more else next(iter(more))
    refused(int8_file(tmp_path / "m.safetensors", **more), word, "not supported")


def test_what_changes_nothing_in_a_description(tmp_path):
    state = {"full_precision_matrix_mult": True, "orig_dtype": "torch.bfloat16", "per_row": True}
    off = {"hadamard": False, "smoothquant": None, "zero_point": 0, "convrot": False}
    ck = open_checkpoint(int8_file(tmp_path / "m.safetensors", **state, **off))
    assert ck.level == "INT8 W8A8"


def test_a_rotation_of_fp8(tmp_path):
    def pack(weight):
        parts, truth = storage.pack_fp8(weight)
        told = {"format": "float8_e4m3fn", "convrot": True, "convrot_groupsize": 64}
        return parts | {"comfy_quant": storage.as_json(told)}, truth

    stored, _ = storage.packed(files.model(), pack, skip=STEM)
    refused(files.save(tmp_path / "m.safetensors", stored), "float8_e4m3fn with convrot")


# ---- good files are read, or refused by name, and never called damaged


def test_long_rotations(tmp_path):
    """The largest power of 4 that divides K, as convert_to_quant's dynamic groups are."""
    sizes = {"num_layers": 1, "attention_head_dim": 512, "intermediate_size": 4096}
    state = files.model(**sizes)

    def pack(weight):
        group = 4096 if weight.shape[1] % 4096 == 0 else 1024
        parts, truth = rotated(weight, group)
        return parts | {"comfy_quant": storage.as_json(conf(group))}, truth

    stored, truth = storage.packed(state, pack, skip=(*STEM, "adaln_modulation"))
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    assert ck.level == "INT8 W8A8 rotated"
    loaded = ck.load("conditional", dtype=torch.float32)
    assert loaded["layers.0.feed_forward.w2.weight"]._params.rotation == 4096
    for name, tensor in truth.items():
        dense = loaded[name].dequantize() if files.is_linear(name) else loaded[name]
        assert torch.allclose(dense.float(), tensor, atol=1e-5 * float(tensor.abs().max())), name


def test_a_rotation_of_no_power_of_four(tmp_path):
    refused(
        int8_file(tmp_path / "m.safetensors", convrot=True, convrot_groupsize=32),
        "groups of 32",
        "not supported",
    )


BLOCKS = {
    "another dtype's format": ("int8_blockwise", torch.rand(4, 2), "fp8"),
    "another block": ("int8_blockwise", torch.rand(8, 4), "int8"),
    "block3d": (None, torch.rand(128, 2, 1), "int8"),
    "block3d of fp8": (None, torch.rand(128, 2, 1), "fp8"),
    "input channels": (None, torch.rand(1, 64), "int8"),
    "input channels of fp8": (None, torch.rand(1, 64), "fp8"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_scales_of_blocks_are_told_by_the_header(tmp_path, case):
    """Those that are read are in ``test_layout_blockwise.py``."""
    told, scale, kind = BLOCKS[case]
    pack = storage.pack_fp8 if kind == "fp8" else lambda w: storage.pack_comfy_int8(w, None)
    stored, _ = storage.packed(files.model(), pack, skip=STEM)
    stored[f"{MODULE}.weight_scale"] = scale
    stored.pop(f"{MODULE}.comfy_quant", None)
    if told:
        stored[f"{MODULE}.comfy_quant"] = storage.as_json({"format": told, "group_size": 32})
    said = refused(files.save(tmp_path / "m.safetensors", stored), MODULE, "not supported")
    assert told is None or told in said


def test_fp8_of_scaled_rows_is_read(tmp_path):
    def pack(weight):
        parts, truth = storage.pack_fp8(weight)
        return parts | {"comfy_quant": storage.as_json({"format": "float8_e4m3fn_rowwise"})}, truth

    stored, truth = storage.packed(files.model(), pack, skip=STEM)
    check_weights(
        open_checkpoint(files.save(tmp_path / "m.safetensors", stored)), "conditional", truth
    )


def test_a_value_that_cannot_be_used_is_no_broken_download(tmp_path):
    """A scale that underflowed to zero: the tool that wrote the file made it so."""
    stored, _ = storage.packed(files.model(), lambda w: storage.pack_comfy_int8(w, None), skip=STEM)
    stored[f"{MODULE}.weight_scale"][3] = 0
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored))
    with pytest.raises(CheckpointError, match=r"w1.*bad scale.*row 3") as caught:
        ck.load("conditional")
    assert "incomplete or damaged" not in str(caught.value)


def test_auto_tells_of_a_file_that_it_cannot_read(tmp_path):
    path = int8_file(tmp_path / "m.safetensors", beside={"svd_up": torch.rand(128, 4)})
    catalogue = read_catalogue(list_files("diffusion_models", [str(tmp_path)]), open_checkpoint)
    assert not catalogue.candidates
    said = refused(path, "svd_up")
    assert catalogue.broken == {"m.safetensors": said}
    int8_file(tmp_path / "cond.safetensors")
    int8_file(tmp_path / "uncond.safetensors")
    catalogue = read_catalogue(list_files("diffusion_models", [str(tmp_path)]), open_checkpoint)
    pair = resolve("auto", catalogue, ["INT8 W8A8"], 1 << 40)
    assert (pair.conditional.name, pair.unconditional.name) == (
        "cond.safetensors",
        "uncond.safetensors",
    )
    assert any(said in note for note in pair.notes)
