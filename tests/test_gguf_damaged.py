"""read_header on files that are corrupt, cut, changed or hostile: a typed error, no allocation."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ideogram4_quant.errors import CheckpointError, CorruptFileError, TruncatedFileError
from ideogram4_quant.gguf_loader import ArrayRef, ValueType, read_header
from ideogram4_quant.tests.gguf_bytes import info, raw_file, sample, text
from ideogram4_quant.tests.timing import cpu_seconds


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sample(tmp_path / "model.gguf")


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return text("k") + struct.pack("<IIQ", ValueType.ARRAY, kind, count) + payload


def one(kind: int, payload: bytes = b"") -> bytes:
    return text("k") + struct.pack("<I", kind) + payload


def deep(levels: int) -> bytes:
    inner = struct.pack("<IQ", ValueType.UINT8, 0)
    for _ in range(levels - 1):
        inner = struct.pack("<IQ", ValueType.ARRAY, 1) + inner
    return text("k") + struct.pack("<I", ValueType.ARRAY) + inner


CORRUPT = {
    "magic": ({"magic": b"GGML"}, "no GGUF file"),
    "tensor count": ({"n_tensors": 1 << 40}, "too many tensors"),
    "metadata count": ({"n_metadata": 1 << 63}, "too many metadata keys"),
    "value type": ({"metadata": one(13), "n_metadata": 1}, "unknown type"),
    "array type": ({"metadata": array(99, 1), "n_metadata": 1}, "unknown type"),
    "nesting": ({"metadata": deep(5), "n_metadata": 1}, "nested too deep"),
    "key encoding": (
        {"metadata": text(b"\xff\xfe") + struct.pack("<IB", 0, 1), "n_metadata": 1},
        "not UTF-8",
    ),
    "text encoding": ({"metadata": one(8, text(b"a\xff")), "n_metadata": 1}, "not UTF-8"),
    "key twice": ({"metadata": one(0, b"\1") * 2, "n_metadata": 2}, "occurs twice"),
    "alignment": (
        {
            "metadata": text("general.alignment") + struct.pack("<II", ValueType.UINT32, 48),
            "n_metadata": 1,
        },
        "alignment",
    ),
    "alignment zero": (
        {
            "metadata": text("general.alignment") + struct.pack("<II", ValueType.UINT32, 0),
            "n_metadata": 1,
        },
        "alignment",
    ),
    "alignment type": (
        {"metadata": text("general.alignment") + struct.pack("<If", 6, 32.0), "n_metadata": 1},
        "alignment",
    ),
    "tensor name": ({"infos": [info(b"\xff")]}, "not UTF-8"),
    "no name": ({"infos": [info("")]}, "no name"),
    "name twice": ({"infos": [info(), info(offset=128)]}, "occurs twice"),
    "dimensions": ({"infos": [info(dims=(1, 1, 1, 1, 1))]}, "too many dimensions"),
    "dimension zero": ({"infos": [info(dims=(32, 0))]}, "impossible dimensions"),
    "dimension product": ({"infos": [info(dims=(1 << 40, 1 << 40))]}, "impossible dimensions"),
    "tensor type": ({"infos": [info(kind=777)]}, "unknown tensor type"),
    "removed type": ({"infos": [info(kind=4)]}, "unknown tensor type"),
    "blocks": ({"infos": [info(dims=(33,), kind=8)]}, "blocks of Q8_0"),
    "offset": ({"infos": [info(offset=16)]}, "not aligned"),
    "overlap": ({"infos": [info("a", (64,)), info("b", (64,), offset=128)]}, "overlaps"),
    "overlap, huge": ({"infos": [info("a", (1 << 60,)), info("b", offset=4096)]}, "overlaps"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(tmp_path: Path, case: str):
    wrong, message = CORRUPT[case]
    path = raw_file(tmp_path, **wrong)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, TruncatedFileError)


@pytest.mark.parametrize(
    ("version", "found"), [(1, "version 1"), (4, "version 4"), (0, "version 0")]
)
def test_other_versions(tmp_path: Path, version: int, found: str):
    with pytest.raises(CheckpointError, match=f"{found}.*Convert"):
        read_header(raw_file(tmp_path, version=version))


def test_big_endian(tmp_path: Path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(str(path), "ideogram4", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("t", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="big endian"):
        read_header(path)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        (one(8, struct.pack("<Q", 1 << 62)), "the value of 'k'"),
        (array(0, 1 << 62), "the value of 'k'"),
        (array(4, 1 << 30), "the value of 'k'"),
        (array(8, 3, text("a") + struct.pack("<Q", 2**64 - 1)), "the value of 'k'"),
        (array(8, 1 << 20), "the value of 'k'"),
        (struct.pack("<Q", 1 << 50), "a metadata key"),
    ],
)
def test_lengths_beyond_the_file_allocate_nothing(tmp_path: Path, metadata: bytes, what: str):
    path = raw_file(tmp_path, metadata=metadata, n_metadata=1)
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedFileError, match=f"inside {what}"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_header_limit_in_a_long_file(tmp_path: Path):
    path = raw_file(tmp_path, metadata=one(8, struct.pack("<Q", 1 << 33)), n_metadata=1)
    with open(path, "r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(CorruptFileError, match="header is too long"):
        read_header(path)


def test_many_empty_strings_are_refused(tmp_path: Path):
    path = raw_file(tmp_path, metadata=array(8, 1 << 25), n_metadata=1)
    with open(path, "r+b") as file:
        file.truncate(1 << 34)

    def refused() -> None:
        with pytest.raises(CorruptFileError, match="too large"):
            read_header(path)

    assert cpu_seconds(refused, 1.0) < 1.0


def test_cut_anywhere(file: Path, tmp_path: Path):
    content = file.read_bytes()
    header = read_header(file)
    last = max(t.offset + t.nbytes for t in header.tensors.values())
    cut = tmp_path / "cut.gguf"
    sizes = {*range(0, header.data_offset, 7), *range(header.data_offset, last, 97), last - 1}
    for size in sorted(sizes):
        cut.write_bytes(content[:size])
        with pytest.raises(TruncatedFileError) as caught:
            read_header(cut)
        assert str(cut) in str(caught.value)
        assert "download it again" in str(caught.value)
    cut.write_bytes(content[: last - 1])
    with pytest.raises(
        TruncatedFileError,
        match=rf"tensor bias.*found {last - 1:,} bytes, needed {last:,} bytes",
    ):
        read_header(cut)


def test_file_that_changed(file: Path):
    header = read_header(file)
    file.write_bytes(file.read_bytes() + bytes(32))
    with pytest.raises(CheckpointError, match="changed"):
        header.array("a.texts")


def test_token_that_is_not_utf8(tmp_path: Path):
    metadata = array(8, 2, text("fine") + text(b"\xc3("))
    header = read_header(raw_file(tmp_path, metadata=metadata, n_metadata=1))
    with pytest.raises(CorruptFileError, match="element 1 of 'k' is not UTF-8"):
        header.array("k")


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutations_raise_typed_errors_only(tmp_path: Path, data: st.DataObject):
    source = tmp_path / "valid.gguf"
    if not source.exists():
        sample(source)
    content = bytearray(source.read_bytes())
    header_size = read_header(source).data_offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_size - 8))
        kind = data.draw(st.sampled_from(["byte", "u64", "insert", "delete", "cut"]))
        if kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "u64":
            value = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            content[at : at + 8] = struct.pack("<Q", value)
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 64))]
        else:
            del content[data.draw(st.integers(0, len(content))) :]
        header_size = max(9, min(header_size, len(content)))
        content += bytes(max(0, 9 - len(content)))
    mutant = tmp_path / "mutant.gguf"
    mutant.write_bytes(bytes(content))
    header, problem = None, None
    try:
        header = read_header(mutant)
        for key, value in header.metadata.items():
            if isinstance(value, ArrayRef):
                header.array(key)
    except CheckpointError as error:
        problem = error
    if problem is not None:
        assert problem.file == str(mutant)
    else:
        ends = [t.offset + t.nbytes for t in header.tensors.values()]
        assert max(ends, default=0) <= len(content)
