"""Mapped model files: no copy, the same values, and errors for files that change underneath."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import mapped, open_checkpoint
from ideogram4_quant.checkpoint.mapped import FileMapping, MappedFile, origin
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, TruncatedFileError
from ideogram4_quant.ops.layouts import gguf_tensor
from ideogram4_quant.ops.layouts.weight import Weight
from ideogram4_quant.pocket import paths
from ideogram4_quant.tests.fixtures_files import write_gguf_py
from ideogram4_quant.tests.test_checkpoint_files import entry, raw_file, tensors

posix = pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be changed there")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save_file(tensors() | {"bytes": torch.arange(200).to(torch.uint8)}, path)
    return path


def over(path: Path, name: str = "bytes"):
    """(the mapped tensor's record, its file)."""
    raw = FileMapping().over(open_tensor_files(path).tensors[name])
    assert isinstance(raw.file, MappedFile)
    return raw, raw.file


def test_values_are_those_of_a_copy(file):
    mapping = FileMapping()
    for name, raw in open_tensor_files(file).tensors.items():
        found, wanted = mapping.over(raw).read(), raw.read()
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert torch.equal(found.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8))
    assert len(mapping.files) == 1  # mapped once


def test_memory_is_the_files_own(file):
    raw, source = over(file)
    place = origin(raw.read())
    assert place.file is source
    assert (place.offset, place.nbytes) == (raw.offset, raw.nbytes)
    assert origin(raw.read()[1:]) is None  # part of it
    assert origin(open_tensor_files(file).tensors["bytes"].read()) is None
    first, second = raw.read(), raw.read()
    assert first.data_ptr() == second.data_ptr()


def test_writing_to_it_leaves_the_file_alone(file):
    before = file.read_bytes()
    over(file)[0].read().fill_(7)
    assert file.read_bytes() == before


def test_an_odd_offset_is_copied_where_the_dtype_needs_an_even_one(tmp_path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    path = raw_file(tmp_path, header)
    mapping, raws = FileMapping(), open_tensor_files(path).tensors
    odd = [raws[name].offset % 4 != 0 for name in "ab"]
    assert any(odd)
    for name, is_odd in zip("ab", odd, strict=True):
        found = mapping.over(raws[name]).read()
        assert torch.equal(found, raws[name].read())
        assert (origin(found) is None) == (is_odd and name == "b")


def test_a_file_that_is_replaced_or_deleted_stays_what_it_was(file, tmp_path):
    raw, source = over(file)
    wanted = raw.read().clone()
    other = tmp_path / "new"
    other.write_bytes(b"other")
    if sys.platform != "win32":
        os.replace(other, file)
        source.check()
        file.unlink()
        source.check()
    assert torch.equal(raw.read(), wanted)


@posix
def test_a_file_that_is_cut_is_an_error_at_the_next_look(file):
    raw, source = over(file)
    os.truncate(file, 100)
    for use in (source.check, raw.read):
        with pytest.raises(TruncatedFileError, match=r"cut short while .* in use.*Load the model"):
            use()


@posix
def test_reading_into_memory_survives_a_cut_at_any_moment(file, monkeypatch):
    """Not even a look between the cut and the read: the process goes on."""
    raw, source = over(file)
    out = torch.empty(raw.nbytes, dtype=torch.uint8)
    source.read_into(raw.offset, out)
    assert torch.equal(out, torch.arange(200).to(torch.uint8))
    os.truncate(file, raw.offset + 10)
    monkeypatch.setattr(MappedFile, "check", lambda self: None)
    with pytest.raises(TruncatedFileError, match="190 bytes less"):
        source.read_into(raw.offset, out)


@posix
def test_a_file_that_is_written_to_is_an_error(file):
    source = over(file)[1]
    data = bytearray(file.read_bytes())
    with open(file, "r+b") as handle:
        handle.write(data)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed while its weights were in use"):
        source.check()


def test_a_file_that_changed_since_its_header_was_read_is_not_mapped(file):
    raw = open_tensor_files(file).tensors["bytes"]
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        FileMapping().over(raw)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        FileMapping().over(raw)


def test_where_nothing_can_be_mapped_it_is_copied_and_said(file, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mapped.mmap, "mmap", refuse)
    monkeypatch.setattr(mapped.mmap, "ACCESS_COPY", mmap.ACCESS_COPY, raising=False)
    mapping = FileMapping()
    raws = open_tensor_files(file).tensors
    read = {name: mapping.over(raw).read() for name, raw in raws.items()}
    assert torch.equal(read["bytes"], torch.arange(200).to(torch.uint8))
    assert mapping.files == ()
    (line,) = caplog.messages
    assert str(file) in line
    assert "cannot be mapped" in line
    assert "file's size in memory" in line


def test_blocks_of_gguf_are_mapped_as_they_lie(tmp_path):
    path = tmp_path / "m.gguf"
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).numpy()
    write_gguf_py(path, {"w": (weight, "Q8_0")})
    raw = FileMapping().over(open_tensor_files(path).tensors["w"])
    quantized = gguf_tensor(raw.read(), "Q8_0", (8, 256), dtype=torch.bfloat16)
    assert quantized._qdata.data_ptr() == raw.read().data_ptr()
    assert origin(quantized._qdata).offset % 32 == 0


def test_a_models_weights_are_views_and_floats_of_its_dtype_too():
    header = open_checkpoint(paths.dit_path("cond"))
    mapping = FileMapping()
    state = header.load("conditional", dtype=torch.bfloat16, mapping=mapping)
    plain = header.load("conditional", dtype=torch.bfloat16)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert all(origin(tensor) is not None for tensor in state.values())


def mapped_weight(tmp_path: Path) -> Weight:
    """A mapped Q8_0 weight, marked as the loader marks it."""
    path = tmp_path / "m.gguf"
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).numpy()
    write_gguf_py(path, {"w": (values, "Q8_0")})
    raw = FileMapping().over(open_tensor_files(path).tensors["w"])
    weight = gguf_tensor(raw.read(), "Q8_0", (8, 256), dtype=torch.float32)
    weight.borrowed = True
    return weight


@torch.inference_mode()
@pytest.mark.parametrize("change", [lambda w: w.mul_(2), lambda w: w.copy_((w * 2).clone())])
def test_a_changed_weight_leaves_its_file(tmp_path, change):
    """What reads the file's bytes in its stead would miss the change."""
    weight = mapped_weight(tmp_path)
    wanted = weight.dequantize() * 2
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    change(parameter)
    assert torch.allclose(parameter.dequantize(), wanted, atol=0.05)
    assert origin(parameter._qdata) is None


@torch.inference_mode()
def test_a_moved_weight_goes_home_without_a_transfer(tmp_path):
    weight = mapped_weight(tmp_path)
    moved = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    back = moved.to("cpu")
    assert back._qdata.data_ptr() == weight._qdata.data_ptr()
    assert torch.equal(back.dequantize(), weight.dequantize())
    with pytest.raises(NotImplementedError):  # meta has no values, so this one cannot come back
        (weight.to("meta").clone()).to("cpu")


@torch.inference_mode()
def test_a_moved_weight_that_changed_does_not_go_home(tmp_path):
    weight = mapped_weight(tmp_path)
    other = weight.to("meta")
    moved = weight.to("meta")
    moved.copy_(other)
    assert moved.home is None
