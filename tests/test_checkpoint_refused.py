"""What open_checkpoint and load refuse or leave out, and what they say of it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import (
    CheckpointError,
    CorruptFileError,
    NotIdeogram4Error,
    OpError,
    TruncatedFileError,
)
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "LoRA"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "text encoder"),
        ("decoder.conv_in.weight", "VAE"),
        ("cap_embedder.0.weight", "no layers.0"),
    ],
)
def test_other_models(tmp_path: Path, key: str, what: str):
    path = files.save(tmp_path / "m.safetensors", {key: torch.zeros(2, 2)})
    with pytest.raises(NotIdeogram4Error, match=what):
        open_checkpoint(path)


def test_missing_tensors_are_named(tmp_path: Path, state):
    del state["layers.1.ffn_norm2.weight"], state["final_layer.linear.bias"]
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    with pytest.raises(
        CorruptFileError,
        match=r"2 tensors.*layers\.1\.ffn_norm2\.weight, final_layer\.linear\.bias",
    ):
        ck.load("conditional")


def test_wrong_shape(tmp_path: Path, state):
    state["layers.1.attention.o.weight"] = torch.zeros(64, 32)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    with pytest.raises(
        CorruptFileError, match=r"layers\.1\.attention\.o\.weight.*\[64, 32\].*\[64, 64\]"
    ):
        ck.load("conditional")


def test_unknown_tensors_are_reported_once(tmp_path: Path, state, caplog):
    state |= {"vae.decoder.weight": torch.zeros(1), "scaled_fp8": torch.zeros(0)}
    with caplog.at_level(logging.WARNING):
        ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
        ck.load("conditional")
        ck.load("conditional")
    assert len(caplog.records) == 1
    assert "ignored 1 tensors" in caplog.text
    assert "vae.decoder.weight" in caplog.text


def test_tensors_without_a_place_in_the_model(tmp_path: Path, state, caplog):
    """A bias of zeros changes nothing; any other is part of the weights."""
    state["layers.0.attention.qkv.bias"] = torch.zeros(192)
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    assert "layers.0.attention.qkv.bias" in caplog.text
    assert "layers.0.attention.qkv.bias" not in ck.load("conditional")
    state["layers.0.attention.qkv.bias"][3] = 1e-3
    path = files.save(tmp_path / "biased.safetensors", state)
    with pytest.raises(CheckpointError, match=r"qkv\.bias: Ideogram 4 has no such tensor"):
        open_checkpoint(path)


def test_dtype_that_weights_do_not_have(tmp_path: Path, state):
    ck = open_checkpoint(files.save(tmp_path / "m.safetensors", state))
    with pytest.raises(OpError, match="no such dtype"):
        ck.stream("conditional", dtype=torch.float64)


def test_a_folder_that_cannot_be_read(tmp_path: Path, state, monkeypatch):
    path = files.save(tmp_path / "m.safetensors", state)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ideogram4_quant.checkpoint.tensor_files._open_file", refuse)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: cannot be read: Permission denied"):
        open_checkpoint(path)


def test_stored_twice(tmp_path: Path, state):
    state["transformer.adaln_proj.weight"] = state["adaln_proj.weight"].clone()
    with pytest.raises(CorruptFileError, match="stored twice"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", state))


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (
            {
                "weight": torch.zeros(64, 32, dtype=torch.int8),
                "weight_scale": torch.ones(1, 64),
                "comfy_quant": storage.as_json({"format": "svdquant_w4a16"}),
            },
            "svdquant_w4a16",
        ),
        ({"weight": torch.zeros(64, 32, dtype=torch.uint8)}, "U8 without a description"),
        (
            {"weight": torch.zeros(64, 64, dtype=torch.int8), "SCB": torch.ones(64)},
            r"adaln_proj\.SCB",
        ),
        (
            {
                "weight": torch.zeros(2048, 1, dtype=torch.uint8),
                "weight.quant_state.bitsandbytes__fp4": storage.as_json({"quant_type": "fp4"}),
            },
            "bitsandbytes fp4",
        ),
    ],
)
def test_formats_that_are_not_read(tmp_path: Path, state, parts: dict, found: str):
    del state["adaln_proj.weight"]
    stored = state | {f"adaln_proj.{suffix}": value for suffix, value in parts.items()}
    path = files.save(tmp_path / "m.safetensors", stored)
    with pytest.raises(CheckpointError, match=rf"adaln_proj.*not supported \(found .*{found}"):
        open_checkpoint(path)


VARIANTS = {  # what a later release may write: (level, what is new in it, words)
    "a key": ("W4A8", {"outliers": 3}, r"asym_w4a8_int8 with outliers 3"),
    "a format": ("W4A8", {"format": "asym_w5a8_int8"}, r"asym_w5a8_int8"),
    "a version": (
        "NVFP4",
        {"format_version": "3", "order": "row"},
        r"nvfp4 with order row, format",
    ),
    "params": ("MXFP8", {"params": {"blocks": 16}}, r"mxfp8 with blocks 16"),
    "a wish": ("INT4 W4A4", {"linear_dtype": "fp3"}, r"linear_dtype 'fp3'"),
}


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("where", ["tensor", "metadata"])
def test_one_weight_of_a_later_variant_in_a_mixed_file(tmp_path: Path, case: str, where: str):
    """The weight, the format and what is known of it; all others are of kinds that are read."""
    level, said, words = VARIANTS[case]
    state = files.fuse(files.split_model(**files.WIDE))
    names = [n for n in state if n.startswith("layers.") and state[n].dim() == 2]
    stored, metadata = {}, {}
    packers = [storage.pack_fp8, lambda w: storage.pack_comfy_int8(w, None), None]
    for number, name in enumerate(names):
        pack, module = packers[number % 3], name.removesuffix(".weight")
        parts = {"weight": state[name].bfloat16()} if pack is None else pack(state[name])[0]
        stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
        state.pop(name)
    odd = "layers.0.feed_forward.w3"
    weight = files.fuse(files.split_model(**files.WIDE))[f"{odd}.weight"]
    stored = {k: v for k, v in stored.items() if not k.startswith(odd)}
    parts, _ = storage.pack_stock(weight, level)
    told = {**storage.STOCK[level][2], **said}
    if where == "metadata":
        del parts["comfy_quant"]
        layers = {"layers": {odd: told}}
        metadata = {"_quantization_metadata": json.dumps(layers)}
    else:
        parts["comfy_quant"] = storage.as_json(told)
    stored |= {f"{odd}.{suffix}": value for suffix, value in parts.items()}
    path = files.save(tmp_path / "mixed.safetensors", state | stored, metadata)
    with pytest.raises(CheckpointError, match=rf"{odd}\.weight.*{words}") as caught:
        open_checkpoint(path).load("conditional")
    if case != "a wish":
        assert "comfy-kitchen 0.2.40" in str(caught.value)


def test_gguf_type_that_is_not_read(tmp_path: Path, state):
    tensors = {name: (tensor.numpy(), "F32") for name, tensor in state.items()}
    blocks = torch.zeros(64, 36, dtype=torch.uint8).numpy()
    tensors["layers.0.attention.o.weight"] = (blocks, "NVFP4")
    path = files.write_gguf_py(tmp_path / "m.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"attention\.o.*NVFP4.*Use a file of Q8_0"):
        open_checkpoint(path)


BAD_PARTS = {
    "int8 without scale": ({"weight_scale": None}, "without a scale"),
    "scale too short": ({"weight_scale": torch.ones(63)}, "no scale of this weight"),
    "scale of integers": ({"weight_scale": torch.ones(64, dtype=torch.int32)}, "no scale"),
    "scale not finite": ({"weight_scale": torch.full((64,), float("nan"))}, "NaN or infinity"),
    "smooth too short": ({"smooth": torch.ones(63)}, "no smooth of this weight"),
    "smooth with zero": ({"smooth": torch.zeros(64)}, "smooth"),
    "rotation group": (
        {
            "comfy_quant": storage.as_json(
                {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}
            )
        },
        "rotation group",
    ),
    "description": ({"comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "no usable JSON"),
    "description type": ({"comfy_quant": torch.zeros(9)}, "no text"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit(tmp_path: Path, state, case: str):
    change, message = BAD_PARTS[case]
    q, scale = storage.pack_int8(state.pop("adaln_proj.weight"))
    parts = {"weight": q, "weight_scale": scale, **change}
    stored = state | {f"adaln_proj.{k}": v for k, v in parts.items() if v is not None}
    path = files.save(tmp_path / "m.safetensors", stored)
    with pytest.raises(CorruptFileError, match=rf"adaln_proj.*{message}"):
        open_checkpoint(path).load("conditional")


BAD_NF4 = {
    "weight.absmax": torch.ones(63),
    "weight.quant_map": torch.ones(15),
    "weight": torch.zeros(2047, 1, dtype=torch.uint8),
    "weight.quant_state.bitsandbytes__nf4": storage.as_json(
        {"quant_type": "nf4", "shape": [64, -64], "blocksize": 64}
    ),
}


@pytest.mark.parametrize("suffix", BAD_NF4)
def test_nf4_parts_that_do_not_fit(tmp_path: Path, state, suffix: str):
    stored, _ = storage.pack_nf4(state.pop("adaln_proj.weight"))
    stored[suffix] = BAD_NF4[suffix]
    state |= {f"adaln_proj.{key}": value for key, value in stored.items()}
    path = files.save(tmp_path / "m.safetensors", state)
    with pytest.raises(CorruptFileError, match="adaln_proj"):
        open_checkpoint(path).load("conditional")


def test_a_scale_without_weight(tmp_path: Path, state):
    state["adaln_proj.weight_scale"] = torch.ones(64)
    del state["adaln_proj.weight"]
    with pytest.raises(CheckpointError, match="adaln_proj"):
        open_checkpoint(files.save(tmp_path / "m.safetensors", state))


def test_file_that_changes_after_opening(tmp_path: Path, state):
    path = files.save(tmp_path / "m.safetensors", state)
    ck = open_checkpoint(path)
    save_file(files.model(1, num_layers=3), path)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        ck.load("conditional")


def test_truncated_download(tmp_path: Path, state):
    path = files.save(tmp_path / "m.safetensors", state)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(
        TruncatedFileError,
        match=rf"m\.safetensors: tensor .*found {size - 10:,} bytes, needed {size:,} .*download",
    ):
        open_checkpoint(path)
