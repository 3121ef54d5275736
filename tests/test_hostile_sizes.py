"""Sizes that are no lie and still too large: tensors, names, shards, each told in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ideogram4_quant.checkpoint import files as checkpoint_files
from ideogram4_quant.checkpoint import open_checkpoint, open_encoder, write_safetensors
from ideogram4_quant.checkpoint.loras import parse_lora, read_lora
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, CorruptFileError
from ideogram4_quant.tests import hostile_files as hostile
from ideogram4_quant.tests.fuzz import seeds
from ideogram4_quant.tests.fuzz.targets import SECONDS
from ideogram4_quant.tests.timing import cpu_seconds


def refused_at_once(
    load: Callable[[Path], object], path: Path, match: str | None = None
) -> CheckpointError:
    """The error that a file is refused with, in less than a second."""
    errors: list[CheckpointError] = []

    def attempt() -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            load(path)
        errors.append(caught.value)

    assert cpu_seconds(attempt, SECONDS) < SECONDS
    return errors[-1]


def test_a_tensor_beyond_memory_is_told(tmp_path: Path, monkeypatch):
    """A file with a hole may be of any size."""
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    opened = open_checkpoint(path)
    monkeypatch.setattr(checkpoint_files.torch, "empty", fail)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*does not fit into memory"):
        opened.load("conditional")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("diffusion_model." * 240_000 + "x.alpha", 1),  # whose prefixes were taken off one by one
        ("x" * 1025, 1),
        *(("." * 240, 16_000), ("transformer_blocks.1" * 50, 3900), ("lora_unet_" * 50, 7000)),
    ],
    ids=["4 MB", "1025", "dots", "blocks", "prefixes"],
)
def test_names_take_no_second(tmp_path: Path, name: str, count: int):
    path = tmp_path / "m.safetensors"
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    names = [name] if count == 1 else [f"{i}{name}.alpha" for i in range(count)]
    path.write_bytes(hostile.safetensors(dict.fromkeys(names, entry), 0))
    shapes = {"layers.0.attention.qkv": (48, 16)}
    for load in (open_checkpoint, open_encoder, lambda p: parse_lora(read_lora(p), shapes, str(p))):
        error = refused_at_once(load, path)
        assert error.file == str(path)
        assert count > 1 or error.tensor == name


def test_a_name_in_a_gguf_file_has_a_length(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(hostile.gguf([hostile.info(b"x" * 1025)]))
    with pytest.raises(CorruptFileError, match="a name too long for a tensor"):
        open_tensor_files(path)
    path.write_bytes(hostile.gguf([hostile.info(b"x" * 1024)]))
    assert len(open_tensor_files(path).tensors) == 1


@pytest.mark.parametrize("name", ["m-00001-of-99999.safetensors", "m.safetensors.index.json"])
def test_more_shards_than_any_model_has(tmp_path: Path, name: str):
    path = tmp_path / name
    index = {"weight_map": {str(i): f"{i}.safetensors" for i in range(100_000)}}
    path.write_text(json.dumps(index))
    error = refused_at_once(open_tensor_files, path, "too many shards")
    assert isinstance(error, CorruptFileError)


@pytest.mark.parametrize("much", ["tensors", "metadata"])
def test_shards_are_bounded_together(tmp_path: Path, much: str):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for i in range(1, 41):
        header = {f"{i}.{j}": entry for j in range(1000)}
        if much == "metadata":
            header = {f"{i}": entry, "__metadata__": {"key": "x" * 1_000_000}}
        (tmp_path / f"m-{i:05d}-of-00040.safetensors").write_bytes(hostile.safetensors(header, 0))
    first = tmp_path / "m-00001-of-00040.safetensors"
    error = refused_at_once(open_tensor_files, first, "the shards together hold too m")
    assert isinstance(error, CorruptFileError)


@pytest.mark.parametrize(
    "name", ["m-00001-of-00000", "m-00003-of-00002", "m-٠٠٠٠١-of-٠٠٠٠٢", "m-00000-of-00001"]
)
def test_names_that_only_look_like_shards_are_single_files(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(hostile.safetensors(hostile._entry()))
    assert open_tensor_files(path).files[0].path == path
