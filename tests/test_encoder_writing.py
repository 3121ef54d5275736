"""Heads and vision towers of encoder files: found under every naming, quantized or not, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_encoder
from ideogram4_quant.checkpoint.encoder_writing import (
    HEAD,
    find_head,
    find_vision,
    head_beside,
    is_head,
    open_head,
)
from ideogram4_quant.checkpoint.listing import list_files
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.tests import encoder_weights
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.encoder_weights import SIZES
from ideogram4_quant.tests.llama_cpp_names import llama_cpp_name
from ideogram4_quant.tests.tiny_writer import VISION, TinyWriter, write_tiny_writer

SHAPE = (SIZES["vocab_size"], SIZES["hidden_size"])


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> TinyWriter:
    return write_tiny_writer(tmp_path_factory.mktemp("writer") / "files", layers=1)


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16().float()


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("model.language_model.", "lm_head.weight"),
        ("model.", "lm_head.weight"),
        ("model.", "model.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_head_in_the_encoders_file(tmp_path: Path, head, prefix: str, name: str):
    stored = {prefix + k: v.bfloat16() for k, v in encoder_weights.random_weights().items()}
    path = files.save(tmp_path / "encoder.safetensors", stored | {name: head.bfloat16()})
    ck = open_encoder(path)
    found = find_head(ck)
    assert torch.equal(found.load(torch.float32)[HEAD], head)
    assert found.size == 2 * head.numel()
    assert HEAD not in ck.entries  # conditioning never loads it
    assert find_vision(ck) is None


@pytest.mark.parametrize("pack", [storage.pack_fp8, storage.pack_comfy_int8])
def test_quantized_head(tmp_path: Path, head, pack):
    stored = {f"model.{k}": v.bfloat16() for k, v in encoder_weights.random_weights().items()}
    parts, truth = pack(head)
    stored |= {f"lm_head.{suffix}": value for suffix, value in parts.items()}
    found = find_head(open_encoder(files.save(tmp_path / "encoder.safetensors", stored)))
    loaded = found.load(torch.float32)[HEAD].dequantize()
    assert (loaded - truth).abs().max() <= 2**-20 * truth.abs().max()


def test_head_of_llama_cpp(tmp_path: Path, head):
    state = encoder_weights.random_weights() | {"x": head}
    tensors = {
        "output.weight" if name == "x" else llama_cpp_name(name): (tensor.numpy(), "F32")
        for name, tensor in state.items()
    }
    path = files.write_gguf_py(tmp_path / "encoder.gguf", tensors, {}, arch="qwen3vl")
    assert torch.equal(find_head(open_encoder(path)).load(torch.float32)[HEAD], head)


def test_vision_tower_is_read_whole(writer: TinyWriter):
    ck = open_encoder(writer.whole)
    found = find_vision(ck)
    truth = {
        name.removeprefix("model.visual."): tensor
        for name, tensor in load_file(writer.whole / "model.safetensors").items()
        if name.startswith("model.visual.")
    }
    loaded = found.load()
    assert set(loaded) == set(truth)
    assert all(torch.equal(loaded[name], truth[name]) for name in truth)
    assert {key: found.config[key] for key in VISION} == VISION
    assert find_vision(open_encoder(writer.headless)) is None


def test_head_in_a_file_of_its_own(writer: TinyWriter, tmp_path: Path):
    ck = open_encoder(writer.headless)
    assert find_head(ck) is None
    for name, kind in (("a_lora", "x.weight"), ("b_other_head", "lm_head.weight")):
        save_file({kind: torch.zeros(3, 4)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    assert head_beside(list_files("text_encoders", [str(tmp_path)]), ck) is None
    (tmp_path / "z.safetensors").write_bytes(writer.head.read_bytes())
    found = head_beside(list_files("text_encoders", [str(tmp_path)]), ck)
    assert found.path.name == "z.safetensors"
    truth = writer.model.lm_head.weight
    assert torch.equal(found.load(torch.float32)[HEAD], truth)
    assert is_head(writer.head)
    assert not is_head(writer.whole / "model.safetensors")


def test_heads_that_do_not_fit_are_refused(writer: TinyWriter, tmp_path: Path):
    ck = open_encoder(writer.headless)
    save_file({"lm_head.weight": torch.zeros(3, 4)}, tmp_path / "small.safetensors")
    with pytest.raises(CorruptFileError, match=r"\[512, 64\]"):
        open_head(tmp_path / "small.safetensors", ck)
    with pytest.raises(CheckpointError, match="no head for writing"):
        open_head(writer.headless / "model.safetensors", ck)


@pytest.mark.parametrize("layers", [[2], [-1], ["1"], [0.5], [], [0, 1], None, 3])
def test_deepstack_that_the_tower_does_not_have(writer: TinyWriter, tmp_path: Path, layers):
    config = json.loads((writer.whole / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(writer.whole / "model.safetensors")
    with pytest.raises(CorruptFileError, match="deepstack"):
        find_vision(open_encoder(tmp_path))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("patch_embed.proj.weight", "cannot be used"),
        ("deepstack_merger_list.0.norm.weight", None),
        ("merger.linear_fc2.weight", "cannot be used"),
    ],
)
def test_damaged_towers_are_refused(writer: TinyWriter, tmp_path: Path, lost: str, said):
    state = load_file(writer.whole / "model.safetensors")
    del state[f"model.visual.{lost}"]
    (tmp_path / "config.json").write_bytes((writer.whole / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    ck = open_encoder(tmp_path / "model.safetensors")
    if said is None:
        assert lost not in find_vision(ck).entries  # the host's module tells of it
        return
    with pytest.raises(CorruptFileError, match=said):
        find_vision(ck)
