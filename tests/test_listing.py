"""Listings of model folders: what is listed, and how a name gets to a path."""

from __future__ import annotations

import os

import pytest

from ideogram4_quant.checkpoint.listing import list_files, new_name, stamp
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.nodes.report import fingerprint


def test_listing_finds_files_folders_and_links_once(tmp_path):
    for name in ("a.safetensors", "sub/b.GGUF", "c.txt", ".hidden/d.gguf", "sub/.e.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pair" / "transformer").mkdir(parents=True)
    (tmp_path / "pair" / "transformer" / "x.safetensors").touch()
    (tmp_path / "shards").mkdir()
    for name in ("model.safetensors.index.json", "model-1.safetensors"):
        (tmp_path / "shards" / name).touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    listing = list_files("models", [str(tmp_path)])
    assert listing.names == ["a.safetensors", "pair", "shards", "sub/b.GGUF"]
    assert listing.path("sub\\b.GGUF") == tmp_path / "sub" / "b.GGUF"


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "sub/../a.safetensors"])
def test_names_are_looked_up_never_joined(tmp_path, name):
    (tmp_path / "a.safetensors").touch()
    listing = list_files("models", [str(tmp_path)])
    assert str(tmp_path) in listing.problem(name)
    with pytest.raises(CheckpointError, match="no such file"):
        listing.path(name)


def test_folder_without_files_says_what_to_put_there(tmp_path):
    empty = list_files("vae", [str(tmp_path)])
    (shown,) = empty.choices
    assert "models/vae" in shown
    message = empty.problem(shown, "flux2-vae.safetensors")
    for words in (str(tmp_path), "press R", "flux2-vae.safetensors"):
        assert words in message
    (tmp_path / "a.safetensors").touch()
    assert list_files("vae", [str(tmp_path)]).choices == ["a.safetensors"]


def test_names_that_another_node_fills_in_are_no_problem_yet(tmp_path):
    (tmp_path / "a.safetensors").touch()
    listing = list_files("models", [str(tmp_path)])
    assert listing.problem(None) is True
    assert listing.problem("a.safetensors") is True


def test_stamp_and_fingerprint_change_with_the_file(tmp_path):
    path = tmp_path / "f.safetensors"
    path.write_bytes(bytes(3_000_000))
    before, mark = stamp(path), fingerprint(path)
    data = bytearray(3_000_000)
    data[0] = 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(0, before[2] + 1))
    assert stamp(path) != before
    assert fingerprint(path) != mark
    assert fingerprint(tmp_path) != fingerprint(path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mine", "mine.gguf"),
        (" mine.gguf ", "mine.gguf"),
        ("v1.5 tuned", "v1.5 tuned.gguf"),
        ("MINE.GGUF", "MINE.GGUF"),
        ("größer", "größer.gguf"),
    ],
)
def test_a_new_file_gets_a_plain_name_with_its_ending(name, wanted):
    assert new_name(name, ".gguf") == wanted


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", "../x", "a/b", "a\\b", "C:x", ".x", "x.", "x\0y", "x\ny", "a*"),
        *("con", "LPT1.gguf", "x.safetensors", "x" * 300),
    ],
)
def test_a_new_file_gets_no_other_name(name):
    with pytest.raises(CheckpointError, match=r"needed a plain name such as my-model\.gguf"):
        new_name(name, ".gguf")
