"""Every writer killed, out of room, without rights, without its source: a whole file or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ideogram4_quant.files import new_file
from ideogram4_quant.files.new_file import WriteError, replaced

ROOT = Path(__file__).resolve().parents[2]
WRITERS = (
    *("safetensors", "gguf", "quantize", "quantize_gguf", "pair", "resumed"),
    *("calibration", "store", "report", "choices"),
)
FEW, MANY = 2, 100  # tries of each writer
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and limits as POSIX has them")


def worker(fault: str, tries: int, folder: Path, kinds: Sequence[str] = WRITERS) -> dict:
    """Writer -> what tests/fault_worker.py saw."""
    command = [sys.executable, "-m", "ideogram4_quant.tests.fault_worker"]
    done = subprocess.run(
        [*command, fault, ",".join(kinds), str(tries), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@posix
@pytest.mark.parametrize(
    "tries", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_at_random_places(tries: int, tmp_path: Path):
    for kind, found in worker("kill", tries, tmp_path).items():
        assert found["wrong"] == [], kind
        assert found["said"] == "", kind
        assert found["again"], (kind, found["files"])  # and what the killed ones left is gone
        assert tries == FEW or found["killed"] > tries // 3, kind
        print(f"{kind}: {found['killed']} of {tries} died while writing, {found['left']} left")


@posix
def test_a_disk_that_fills_up(tmp_path: Path):
    for kind, found in worker("full", 1, tmp_path).items():
        assert found["source"], kind
        for limit, said, unchanged in found["results"]:
            assert unchanged, (kind, limit, said)
            if kind == "choices":  # a cache that cannot be written is a warning
                assert said == ""
            else:
                assert said.startswith("WriteError: "), (kind, said)
                assert "cannot be written: File too large" in said
        left = [name for name in found["files"] if ".partial" in name]
        assert left == (["out.safetensors.partial"] if kind == "resumed" else []), kind


@posix
def test_a_folder_that_is_read_only(tmp_path: Path):
    for parent in (tmp_path, *tmp_path.parents[:3]):  # another user must be able to come here
        if parent.owner() == Path.home().owner():
            parent.chmod(parent.stat().st_mode | 0o055)
    for kind, found in worker("readonly", 1, tmp_path).items():
        assert found["same"], kind
        if kind != "choices":
            assert found["said"].startswith("WriteError: "), (kind, found["said"])
            assert "Choose a folder you may write to" in found["said"]


@posix
def test_a_source_that_vanishes(tmp_path: Path):
    for kind, found in worker("vanish", 1, tmp_path, ("quantize", "quantize_gguf")).items():
        assert found["said"].startswith("CheckpointError: "), (kind, found["said"])
        assert "bf16.safetensors: cannot be read: No such file" in found["said"]
        assert found["files"] == ["source/bf16-unconditional.safetensors"]


class InUse(PermissionError):
    """What Windows raises where a file to be replaced is mapped by a program that loaded it."""

    winerror = 1224


def test_a_target_that_is_in_use_on_windows(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.json"
    path.write_text("old")

    def refuse(*_) -> None:
        raise InUse(13, "The requested operation cannot be performed on a file with a mapping open")

    monkeypatch.setattr(new_file.os, "replace", refuse)
    with (
        pytest.raises(WriteError, match=r"model\.json: cannot be replaced: a program has it open"),
        replaced(path) as part,
    ):
        part.write_text("new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.json"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path):
    """Only its lock tells: it may stand still for longer than the grace period."""
    path = tmp_path / "out.bin"
    with new_file.new_file(path, 3) as outer:
        outer.write_at(0, b"one")
        (part,) = tmp_path.iterdir()
        os.utime(part, (1, 1))
        with new_file.new_file(path, 3) as inner:
            inner.write_at(0, b"two")
        path.unlink()
    assert path.read_bytes() == b"one"


def test_strangers_files_are_never_swept(tmp_path: Path):
    names = ("out.bin.partial", "out.bin.1-zzzzzzzz.partial", "other.bin.1-01234567.partial")
    for name in names:
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (1, 1))
    with new_file.new_file(tmp_path / "out.bin", 1) as file:
        file.write_at(0, b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*names, "out.bin"))
