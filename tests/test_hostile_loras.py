"""LoRAs from strangers: what does not fit is named, what is none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import files as checkpoint_files
from ideogram4_quant.checkpoint import write_safetensors
from ideogram4_quant.checkpoint.loras import parse_lora, read_lora
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.tests.fuzz import seeds, targets

_DOWN = "diffusion_model.layers.0.attention.qkv.lora_A.weight"
_UP = "diffusion_model.layers.0.attention.qkv.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({_DOWN: None}, "layers.0.attention.qkv"),
        ({_UP: None}, "layers.0.attention.qkv"),
        ({_UP: torch.zeros(48, 3)}, "layers.0.attention.qkv"),
        ({_UP: torch.zeros(48, 2, 1)}, "layers.0.attention.qkv"),
        ({_DOWN: torch.zeros(())}, "layers.0.attention.qkv"),
        ({_DOWN: torch.zeros(0, 16), _UP: torch.zeros(48, 0)}, "layers.0.attention.qkv"),
        ({_DOWN: torch.full((2, 16), float("nan"))}, "layers.0.attention.qkv"),
        ({_UP: torch.full((48, 2), float("inf"))}, "layers.0.attention.qkv"),
        ({_DOWN.replace("lora_A.weight", "alpha"): torch.ones(3)}, "layers.0.attention.qkv"),
        ({_DOWN.replace("lora_A.weight", "alpha"): torch.ones(0)}, "layers.0.attention.qkv"),
        (
            {_DOWN.replace("lora_A.weight", "alpha"): torch.tensor(float("inf"))},
            "layers.0.attention.qkv",
        ),
        ({_DOWN.replace("lora_A.weight", "dora_scale"): torch.ones(47)}, "layers.0.attention.qkv"),
    ],
)
def test_a_lora_that_does_not_fit_is_named(tmp_path: Path, change: dict, named: str):
    path = tmp_path / "lora.safetensors"
    state = {**seeds.lora(), **change}
    write_safetensors(path, {k: v for k, v in state.items() if v is not None})
    with pytest.raises(CheckpointError) as caught:
        parse_lora(read_lora(path), targets.LORA_SHAPES, path.name)
    assert caught.value.file == path.name
    assert named in caught.value.tensor


def test_two_spellings_of_one_half_are_refused(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    other = _DOWN.replace("diffusion_model.", "transformer.")
    write_safetensors(path, {**seeds.lora(), other: torch.ones(2, 16)})
    with pytest.raises(CorruptFileError, match="twice"):
        parse_lora(read_lora(path), targets.LORA_SHAPES, path.name)


def test_a_pickle_under_any_name_is_no_lora(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    torch.save({_DOWN: torch.zeros(2, 16)}, path)
    with pytest.raises(CorruptFileError, match="pickle"):
        read_lora(path)


def test_a_gguf_file_is_no_lora(tmp_path: Path):
    with pytest.raises(CheckpointError, match="read from safetensors"):
        read_lora(seeds.gguf(tmp_path / "lora.gguf"))


def test_a_whole_model_is_no_lora_and_not_read_to_find_that_out(tmp_path: Path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, seeds.transformer())
    monkeypatch.setattr(checkpoint_files.SourceFile, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="holds no LoRA for Ideogram 4"):
        read_lora(path)
