"""Files that change while they are read, names that lead out of a folder, links and pipes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import files as checkpoint_files
from ideogram4_quant.checkpoint import open_checkpoint, write_safetensors
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, TruncatedFileError
from ideogram4_quant.gguf_loader import read_header
from ideogram4_quant.tests.fuzz import seeds


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())
    opened = open_checkpoint(path)
    empty = torch.empty

    def shrink(*arguments, **keywords):  # between the check of the file and the first byte
        os.truncate(path, 2000)
        return empty(*arguments, **keywords)

    monkeypatch.setattr(checkpoint_files.torch, "empty", shrink)
    with pytest.raises(TruncatedFileError, match=r"m\.safetensors: the file ends early"):
        opened.load("conditional")


def test_a_file_that_is_rewritten_while_it_is_read(tmp_path: Path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())
    opened = open_checkpoint(path)
    empty = torch.empty

    def rewrite(*arguments, **keywords):
        os.utime(path, ns=(1, 1))
        return empty(*arguments, **keywords)

    monkeypatch.setattr(checkpoint_files.torch, "empty", rewrite)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        opened.load("conditional")


def test_a_file_that_vanishes(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, seeds.transformer())
    opened = open_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.safetensors: cannot be read: No such file"):
        opened.load("conditional")
    path = seeds.gguf(tmp_path / "m.gguf")
    header = read_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be read: No such file"):
        header.array("a.list")


def test_an_array_that_is_other_than_in_the_header(tmp_path: Path):
    """Same size, same time, other bytes: the lengths inside are checked again."""
    path = seeds.gguf(tmp_path / "m.gguf")
    state, header = path.stat(), read_header(path)
    content = bytearray(path.read_bytes())
    at = header.metadata["a.texts"].offset
    content[at : at + 8] = struct.pack("<Q", 1 << 62)
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        header.array("a.texts")


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x"),
        *("\ud800", "a\0b", "x" * 300, 7, None, ["m-00001-of-00002.safetensors"]),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "secret.safetensors", seeds.transformer())
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"adaln_proj.weight": name}}))
    opened = []
    plain = open

    def watched(file, *arguments, **keywords):
        opened.append(str(file))
        return plain(file, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", watched)
    with pytest.raises(CheckpointError) as caught:
        open_tensor_files(index)
    assert caught.value.file == str(index)
    assert [file for file in opened if not file.startswith(str(folder))] == []


def test_names_in_a_file_are_keys_and_never_paths(tmp_path: Path):
    """Tensors called like files are ignored like any stranger."""
    path = tmp_path / "m.safetensors"
    strange = {"../../etc/passwd": torch.zeros(1), "..": torch.zeros(1), "a\0b": torch.zeros(1)}
    write_safetensors(path, seeds.transformer() | strange)
    opened = open_checkpoint(path)
    assert not set(strange) & set(opened.shapes("conditional"))
    assert len(opened.load("conditional")) == len(seeds.transformer())


def test_links_that_lead_nowhere_and_in_circles(tmp_path: Path):
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle.safetensors").symlink_to(tmp_path / "circle.safetensors")
    for name in ("gone.safetensors", "circle.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            open_tensor_files(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_model_and_never_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: there is no such file"):
        open_tensor_files(tmp_path / "m.safetensors")
