"""Safetensors headers against the safetensors library, damaged files, folders, indexes, shards."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint.files import TORCH_DTYPES
from ideogram4_quant.checkpoint.safetensors_header import read_safetensors_header
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.errors import CheckpointError, CorruptFileError, TruncatedFileError
from ideogram4_quant.tests import fixtures_files as files


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for number, dtype in enumerate(TORCH_DTYPES.values()):
        data = torch.randint(0, 2, (3, number + 1, 2), generator=generator)
        out[f"t{number}.größe"] = data.to(dtype)
    return out | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}


def raw_file(tmp_path: Path, header: object, data: int = 64, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "raw.safetensors"
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + bytes(data))
    return path


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_equals_the_library(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file(tensors(), path, metadata={"key": "wörth"})
    file, found, metadata = read_safetensors_header(path)
    assert metadata == {"key": "wörth"}
    assert (file.size, file.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    expected = load_file(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        read = found[name].read()
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == torch.Size(found[name].shape)
        assert torch.equal(read.contiguous().view(-1), tensor.view(-1))


def test_headers_without_padding_or_with_holes(tmp_path: Path):
    """Offsets may be odd; a misaligned tensor is read all the same."""
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (3, 11))}
    path = raw_file(tmp_path, header)
    tensor = read_safetensors_header(path)[1]["b"].read()
    assert torch.equal(tensor, torch.zeros(2))


CORRUPT = {
    "no JSON": (b"{" + b"x" * 20, "no usable JSON"),
    "JSON cut": (b'{"a": ', "no usable JSON"),
    "not UTF-8": (b'{"\xff": 1}', "no usable JSON"),
    "nested": (b'{"a":' + b"[" * 50_000, "no usable JSON"),
    "digits": (b'{"a":' + b"9" * 5_000 + b"}", "no usable JSON"),
    "not an object": (b"[1, 2]    ", "no safetensors file"),
    "name twice": (b'{"a":1,"a":2}', "'a' occurs twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "no map of texts"),
    "metadata list": ({"__metadata__": []}, "no map of texts"),
    "entry": ({"a": 3}, "no object"),
    "dtype": ({"a": entry("F31")}, "unknown dtype"),
    "dtype list": ({"a": entry(["F32"])}, "unknown dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "impossible shape"),
    "negative": ({"a": entry(shape=(-1, -4))}, "impossible shape"),
    "float": ({"a": entry(shape=(2.0, 2))}, "impossible shape"),
    "bool": ({"a": entry(shape=(True, 4))}, "impossible shape"),
    "huge": ({"a": entry(shape=(1 << 63,))}, "impossible shape"),
    "overflow": ({"a": entry(shape=(1 << 62, 1 << 62))}, "does not fit"),
    "offsets": ({"a": entry(offsets=(16, 0))}, "impossible offsets"),
    "three offsets": ({"a": entry(offsets=(0, 8, 16))}, "impossible offsets"),
    "length": ({"a": entry(offsets=(0, 12))}, "does not fit"),
    "half a byte": ({"a": entry("F4", (3,), (0, 1))}, "does not fit"),
    "overlap": ({"a": entry(), "b": entry(offsets=(8, 24))}, "overlaps that of b"),
    "same place": ({"a": entry(), "b": entry()}, "overlaps"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_headers(tmp_path: Path, case: str):
    header, message = CORRUPT[case]
    path = raw_file(tmp_path, header)
    with pytest.raises(CorruptFileError, match=message) as caught:
        open_tensor_files(path)
    assert str(path) in str(caught.value)
    with pytest.raises(SafetensorError), safe_open(path, "pt") as file:
        file.keys()


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_header_length(tmp_path: Path, length: int):
    path = raw_file(tmp_path, {"a": entry()}, length=length)
    with pytest.raises(CorruptFileError, match="no safetensors file"):
        open_tensor_files(path)


def test_a_header_longer_than_is_read_is_no_broken_download(tmp_path: Path):
    path = raw_file(tmp_path, b'{"__metadata__": {"a": "' + b"x" * (7 << 20) + b'"}}')
    with pytest.raises(CorruptFileError, match="longer than any model needs") as caught:
        open_tensor_files(path)
    assert "damaged" not in str(caught.value)


def test_a_long_header_of_numbers_is_not_built(tmp_path: Path):
    """Each takes two bytes of text and eight of memory."""
    path = raw_file(tmp_path, b'{"a": {"shape": [' + b"1," * 2_600_000 + b"1]}}")
    with pytest.raises(CorruptFileError, match="too many values"):
        open_tensor_files(path)


def test_cut_anywhere(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    save_file({"first": torch.ones(9), "second": torch.ones(5)}, path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(TruncatedFileError, match="download it again") as caught:
            open_tensor_files(path)
        assert f"found {size:,} bytes" in str(caught.value)
    assert caught.value.tensor == "second"
    assert caught.value.needed == f"{len(content):,} bytes"


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutations_raise_typed_errors_only(tmp_path: Path, data: st.DataObject):
    source = tmp_path / "valid.safetensors"
    if not source.exists():
        save_file({"a.weight": torch.ones(4, 5), "b": torch.ones(7).bfloat16()}, source)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if data.draw(st.booleans()):
            content[at : at + 1] = data.draw(st.binary(max_size=3))
        else:
            content[at : at + 1] = data.draw(st.sampled_from([b"-", b"9", b"[", b'"', b",", b"{"]))
    mutant = tmp_path / "mutant.safetensors"
    mutant.write_bytes(bytes(content))
    problem, found_files = None, None
    try:
        found_files = open_tensor_files(mutant)
    except CheckpointError as error:
        problem = error
    if problem is not None:
        assert problem.file == str(mutant)
    else:
        for tensor in found_files.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(content)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>" + bytes(99), "a web page"),
        (b"PK\x03\x04" + bytes(99), "zip archive or a PyTorch pickle"),
        (b"\x80\x02}q\x00" + bytes(99), "pickle"),
    ],
)
def test_what_people_save_instead(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=what):
        open_tensor_files(path)


def test_header_lengths_that_look_like_other_files(tmp_path: Path):
    """640 is 80 02 in little endian, as a pickle starts; the JSON behind it tells."""
    text = json.dumps({"a": entry()}).encode()
    path = raw_file(tmp_path, text + b" " * (640 - len(text)))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert set(open_tensor_files(path).tensors) == {"a"}


def test_contents_not_names_tell_the_format(tmp_path: Path):
    tensor = {"a": (torch.ones(3).numpy(), "F32")}
    path = files.write_gguf_py(tmp_path / "misnamed.safetensors", tensor)
    assert open_tensor_files(path).kind == "gguf"


def test_nothing_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_tensor_files(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="holds no model"):
        open_tensor_files(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(TruncatedFileError):
        open_tensor_files(tmp_path / "empty.safetensors")


def test_folder_with_several_models(tmp_path: Path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors.*Name one"):
        open_tensor_files(tmp_path)
    save_file({"y": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(open_tensor_files(tmp_path).tensors) == {"y"}


def shards(folder: Path) -> Path:
    save_file({"a": torch.ones(1)}, folder / "m-00001-of-00002.safetensors", {"k": "one"})
    save_file({"b": torch.ones(2)}, folder / "m-00002-of-00002.safetensors", {"k": "two"})
    return folder / "m.safetensors.index.json"


def index(path: Path, weight_map: object) -> Path:
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards(tmp_path: Path):
    path = shards(tmp_path)
    names = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for opened in (tmp_path, tmp_path / names[1]):
        found_files = open_tensor_files(opened)
        assert list(found_files.tensors) == ["a", "b"]
        assert [file.path.name for file in found_files.files] == names
    index(path, {"a": names[0], "b": names[1]})
    for opened in (tmp_path, path, tmp_path / names[1]):
        found_files = open_tensor_files(opened)
        assert list(found_files.tensors) == ["a", "b"]
        assert found_files.metadata == {"k": "one"}
        assert found_files.size == sum((tmp_path / name).stat().st_size for name in names)


def test_missing_shard(tmp_path: Path):
    path = shards(tmp_path)
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(TruncatedFileError, match=r"1 of 2 shards are missing.*m-00001"):
        open_tensor_files(tmp_path / "m-00002-of-00002.safetensors")
    index(path, {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"})
    with pytest.raises(TruncatedFileError, match="Download the missing files"):
        open_tensor_files(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path):
    shards(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match="in two shards"):
        open_tensor_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["../m-00001-of-00002.safetensors", "/etc/passwd", "..", "", "a\\b", "c:d", 3, None]
)
def test_an_index_stays_in_its_folder(tmp_path: Path, name: object):
    shards(tmp_path)
    path = index(tmp_path / "m.safetensors.index.json", {"a": name})
    with pytest.raises(CorruptFileError, match="names no plain file"):
        open_tensor_files(path)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], "a"])
def test_index_without_map(tmp_path: Path, weight_map: object):
    with pytest.raises(CorruptFileError, match="no weight_map"):
        open_tensor_files(index(tmp_path / "m.safetensors.index.json", weight_map))


def test_index_that_names_the_wrong_shard(tmp_path: Path):
    path = shards(tmp_path)
    index(path, {"a": "m-00002-of-00002.safetensors", "b": "m-00001-of-00002.safetensors"})
    with pytest.raises(CorruptFileError, match="tensor a: the tensor is not in m-00002"):
        open_tensor_files(path)


def test_split_gguf(tmp_path: Path):
    tensor = {"a": (torch.ones(3).numpy(), "F32")}
    path = files.write_gguf_py(tmp_path / "m-00001-of-00002.gguf", tensor, {"split.count": 2})
    with pytest.raises(CheckpointError, match="Join them"):
        open_tensor_files(path)
