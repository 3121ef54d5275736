"""Matrices whose rows are read when asked for: the library's values, and a file that goes away."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import files
from ideogram4_quant.checkpoint.safetensors_header import read_safetensors_header
from ideogram4_quant.checkpoint.stored_rows import StoredRows
from ideogram4_quant.errors import CheckpointError, TruncatedFileError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def stored(path: Path, name: str = "w") -> StoredRows:
    return StoredRows(read_safetensors_header(path)[1][name])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """``w`` lies behind a tensor of an odd number of bytes."""
    target = tmp_path / "m.safetensors"
    weight = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    save_file({"a": torch.zeros(3, dtype=torch.int8), "w": weight.bfloat16()}, target)
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [slice(0, 7), slice(5, 6), slice(30, 99), slice(None), slice(4, 4)]
)
def test_rows_are_the_librarys(tmp_path, dtype, rows):
    target = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(37, 5).to(dtype)}, target)
    weight = load_file(target)["w"]
    found = stored(target)
    assert (found.shape, found.ndim, found.dtype) == ((37, 5), 2, dtype)
    assert torch.equal(found[rows], weight[rows])
    assert found[rows].dtype == dtype


def test_only_the_rows_asked_for_are_read(path, monkeypatch):
    asked = []
    read = files.SourceFile.read

    def watched(self, offset, nbytes, itemsize=1):
        asked.append(nbytes)
        return read(self, offset, nbytes, itemsize)

    found = stored(path)
    monkeypatch.setattr(files.SourceFile, "read", watched)
    found[10:13]
    assert asked == [3 * 5 * 2]


def test_threads_read_side_by_side(path):
    found, weight = stored(path), load_file(path)["w"]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda n: found[n : n + 1], range(37)))
    assert torch.equal(torch.cat(parts), weight)


def test_what_is_no_matrix_of_floats_does_not_fit(tmp_path):
    target = tmp_path / "m.safetensors"
    save_file(
        {
            "w": torch.ones(2, 3),
            "vector": torch.ones(3),
            "codes": torch.ones(2, 3, dtype=torch.int8),
            "double": torch.ones(2, 3, dtype=torch.float64),
            "empty": torch.ones(0, 3),
        },
        target,
    )
    tensors = read_safetensors_header(target)[1]
    assert [name for name, raw in tensors.items() if StoredRows.fits(raw)] == ["w"]


def cut(path: Path) -> None:
    state = path.stat()
    os.truncate(path, state.st_size - 20)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(0, 0))


def replace_by_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(0, 0))
    other.replace(path)


@pytest.mark.parametrize("harm", [cut, change, replace_by_another, Path.unlink])
def test_a_file_that_goes_away_is_an_error_of_the_next_rows(path, harm):
    found = stored(path)
    first = found[0:2].clone()
    harm(path)
    with pytest.raises(CheckpointError) as caught:
        found[35:37]
    assert str(path) in str(caught.value)
    assert torch.isfinite(first.float()).all()


def test_a_file_that_is_cut_while_rows_are_read_is_an_error(path, monkeypatch):
    """The size is looked at before and after: here it shrinks between the two."""
    found = stored(path)
    room = files.SourceFile._room

    def harmed(self, nbytes):
        os.truncate(path, 100)
        return room(self, nbytes)

    monkeypatch.setattr(files.SourceFile, "_room", harmed)
    with pytest.raises((TruncatedFileError, CheckpointError)):
        found[0:37]
