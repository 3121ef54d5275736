"""Tensors beside a weight are used or refused by name, never passed over.

Every file is made here by hand, its true weights by the dense formula of its format.
"""

from __future__ import annotations

import logging

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import NotIdeogram4Error
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.checkpoint_weights import check_weights
from ideogram4_quant.tests.fixtures_passed_over import (
    MODULE,
    PREFIX,
    SIBLINGS,
    STEM,
    int8_file,
    refused,
    rotated,
)


@pytest.mark.parametrize("kind", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("suffix", SIBLINGS)
def test_a_tensor_that_is_not_understood(tmp_path, suffix, kind):
    packs = {
        "int8": lambda w: storage.pack_comfy_int8(w, None),
        "fp8": storage.pack_fp8,
        "bf16": lambda w: ({"weight": w.bfloat16()}, w),
    }
    stored, _ = storage.packed(files.model(), packs[kind], "transformer.", skip=STEM)
    stored[f"transformer.{MODULE}.{suffix}"] = SIBLINGS[suffix]
    path = files.save(tmp_path / "m.safetensors", stored)
    refused(path, f"{MODULE}.{suffix}", "not supported")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_sdnq(tmp_path, dtype):
    """``scale`` for ``weight_scale``: read as unscaled fp8 the weights were 3,450 x off."""

    def pack(weight):
        parts, _ = storage.pack_fp8(weight)
        data = parts["weight"] if dtype is not torch.int8 else storage.pack_int8(weight)[0]
        return {"weight": data, "scale": parts["weight_scale"].reshape(-1, 1)}, weight

    stored, _ = storage.packed(files.split_model(), pack, skip=["adaln"])
    folder = tmp_path / "transformer"
    files.save(folder / "diffusion_pytorch_model.safetensors", stored)
    refused(folder, ".scale", "SDNQ")


@pytest.mark.parametrize(
    ("parts", "whose"),
    [
        ({"weight._data": torch.int8, "weight._scale": torch.float32}, "optimum-quanto"),
        ({"_weight_qdata": torch.int8, "_weight_scale": torch.float32}, "torchao"),
        ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "GPTQ"),
        ({"weight_packed": torch.int32, "weight_scale": torch.float16}, "compressed-tensors"),
        ({"W_q": torch.uint8, "meta": torch.uint8}, "HQQ"),
    ],
)
@pytest.mark.parametrize("all_of_them", [True, False])
def test_formats_that_name_the_weight_otherwise(tmp_path, parts, whose, all_of_them):
    """They were called no Ideogram 4, or said to be incomplete."""
    stored = {}
    for name, tensor in files.model().items():
        if files.is_linear(name) and (all_of_them or name.endswith("w2.weight")):
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{end}": torch.ones(8).to(dtype) for end, dtype in parts.items()}
        else:
            stored[name] = tensor.bfloat16()
    refused(files.save(tmp_path / "m.safetensors", stored), whose, "not supported")


def test_a_lora_is_still_a_lora(tmp_path):
    module = "diffusion_model.layers.0.attention.qkv"
    stored = {f"{module}.lora_A.weight": torch.ones(4, 64)}
    stored[f"{module}.lora_B.weight"] = torch.ones(192, 4)
    with pytest.raises(NotIdeogram4Error, match="a LoRA"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", stored))


HARMLESS = {
    "input_scale": torch.ones(()),
    "scale_input": torch.ones(128, 1),
    "output_scale": torch.ones(()),
    "input_amax": torch.ones(64),
    "input_quantizer._amax": torch.ones(()),
}


def test_ranges_of_activations_change_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ck = open_checkpoint(int8_file(tmp_path / "m.safetensors", beside=HARMLESS))
    assert ck.level == "INT8 W8A8"
    assert not caplog.records


def test_smoothing_beside_fp8_is_not_dropped(tmp_path):
    stored, _ = storage.packed(files.model(), storage.pack_fp8, skip=STEM)
    stored[f"{MODULE}.pre_quant_scale"] = torch.rand(64) + 0.5
    refused(files.save(tmp_path / "m.safetensors", stored), f"{MODULE}.pre_quant_scale")


@pytest.mark.parametrize("described", [True, False])
def test_floats_that_are_told_to_be_scaled(tmp_path, described):
    state = files.model()
    parts = {"weight_scale": torch.full((128, 1), 0.5)}
    if described:
        parts = {"comfy_quant": storage.as_json({"format": "int8_tensorwise"})}
    state |= {f"{MODULE}.{suffix}": value for suffix, value in parts.items()}
    refused(files.save(tmp_path / "m.safetensors", state), MODULE, "F32 values")


@pytest.mark.parametrize("key", ["hadamard_matrix", f"{PREFIX}rotation.weight", "quarot"])
def test_a_rotation_told_by_a_tensor_of_its_own(tmp_path, key):
    stored, _ = storage.packed(files.model(), lambda w: rotated(w, 64), PREFIX, skip=STEM)
    path = files.save(tmp_path / "m.safetensors", stored | {key: torch.eye(4)})
    refused(path, key, "tells of a change to its weights")


@pytest.mark.parametrize(
    "key", ["layers.0.attention.qkv_smooth", "layers.1.ffn_smooth", "layers.0.experts.0.w1.weight"]
)
def test_a_tensor_in_a_layer_that_is_of_no_module(tmp_path, key):
    stored, _ = storage.packed(files.model(), storage.pack_fp8, PREFIX, skip=STEM)
    path = files.save(tmp_path / "m.safetensors", stored | {PREFIX + key: torch.rand(4)})
    refused(path, key, "Ideogram 4 has no such tensor")


def test_a_wish_for_the_hosts_attention_is_no_weight(tmp_path, caplog):
    key = "layers.0.attention.comfy_attention.config"
    state = files.model() | {key: storage.as_json({"attention": "comfy_kitchen_int8"})}
    assert open_checkpoint(files.save(tmp_path / "m.safetensors", state)).level == "BF16"
    assert not caplog.records


def test_one_linear_under_both_of_its_names(tmp_path):
    """The later one won, without a word."""
    state = files.model()
    both = state | {"layers.0.attention.to_out.0.weight": state["layers.0.attention.o.weight"] + 1}
    refused(files.save(tmp_path / "m.safetensors", both), "attention.o.weight", "stored twice")


@pytest.mark.parametrize(
    "key",
    [
        f"model.{MODULE}.weight_zero_point",
        f"quant.{MODULE}.svd_up",
        f"smooth.{MODULE}",
        f"base_model.model.{MODULE}.lora_A.weight",
        f"lora_unet_{MODULE.replace('.', '_')}.lora_up.weight",
        "final_layer.smooth",
        "input_proj_smooth",
        "smoothquant_factors",
    ],
)
def test_a_tensor_of_a_weight_under_another_prefix(tmp_path, key):
    """A line in the log said that it was ignored, and the picture was wrong."""
    stored, _ = storage.packed(files.model(), storage.pack_fp8, skip=STEM)
    stored[key] = torch.rand(128, 4)
    refused(files.save(tmp_path / "m.safetensors", stored), key, "it is not understood")


def test_other_weights_in_the_file_are_none_of_ours(tmp_path, caplog):
    stored, truth = storage.packed(files.model(), storage.pack_fp8, PREFIX, skip=STEM)
    others, _ = storage.packed(files.model(), storage.pack_fp8, "average.", skip=STEM)
    with caplog.at_level(logging.WARNING):
        ck = open_checkpoint(files.save(tmp_path / "m.safetensors", stored | others))
    check_weights(ck, "conditional", truth)
    assert "ignored" in caplog.text
