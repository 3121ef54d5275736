"""read_header against gguf-py, every type of value, and large files."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from ideogram4_quant.gguf_loader import TENSOR_TYPES, ArrayRef, ValueType, read_header
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests.gguf_bytes import METADATA, info, raw_file, sample, text
from ideogram4_quant.tests.timing import cpu_seconds


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sample(tmp_path / "model.gguf")


def test_type_table_equals_gguf_py():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        ours = TENSOR_TYPES[int(kind)]
        assert ours.name == kind.name
        # gguf-py says 40 bytes for Q8_1, a type that files never hold; in ggml it has two fp16
        if kind.name != "Q8_1":
            assert (ours.block_size, ours.type_size) == sizes
    assert len(TENSOR_TYPES) == len(gguf.GGML_QUANT_SIZES)


def test_header_equals_gguf_py(file: Path):
    header = read_header(file)
    oracle = gguf.GGUFReader(file)
    assert header.version == 3
    assert header.alignment == oracle.alignment
    assert header.data_offset == oracle.data_offset
    assert header.file_size == file.stat().st_size
    assert header.mtime_ns == file.stat().st_mtime_ns
    assert list(header.tensors) == [tensor.name for tensor in oracle.tensors]
    content = file.read_bytes()
    for tensor in oracle.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.ggml_type == tensor.tensor_type
        assert ours.type_name == tensor.tensor_type.name
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        data = content[ours.offset : ours.offset + ours.nbytes]
        assert data == np.ascontiguousarray(tensor.data).tobytes()


def test_metadata_equals_gguf_py(file: Path):
    header = read_header(file)
    oracle = {k: v for k, v in gguf.GGUFReader(file).fields.items() if not k.startswith("GGUF.")}
    assert set(header.metadata) == set(oracle) == {*METADATA, "general.architecture"}
    for key, field in oracle.items():
        value = header.metadata[key]
        if isinstance(value, ArrayRef):
            assert value.count == len(field.data)
            value = header.array(key)
        assert value == field.contents()
    assert header.array("a.texts") == METADATA["a.texts"]
    with pytest.raises(KeyError):
        header.array("a.count")


def test_every_scalar_type(tmp_path: Path):
    values = {
        ValueType.UINT8: ("B", 255),
        ValueType.INT8: ("b", -128),
        ValueType.UINT16: ("H", 65535),
        ValueType.INT16: ("h", -32768),
        ValueType.UINT32: ("I", 2**32 - 1),
        ValueType.INT32: ("i", -(2**31)),
        ValueType.FLOAT32: ("f", 1.5),
        ValueType.BOOL: ("?", True),
        ValueType.UINT64: ("Q", 2**64 - 1),
        ValueType.INT64: ("q", -(2**63)),
        ValueType.FLOAT64: ("d", 1e300),
    }
    metadata = b"".join(
        text(kind.name) + struct.pack("<I" + code, kind, value)
        for kind, (code, value) in values.items()
    )
    header = read_header(raw_file(tmp_path, metadata=metadata, n_metadata=len(values)))
    assert header.metadata == {kind.name: value for kind, (_, value) in values.items()}


def test_nested_arrays(tmp_path: Path):
    first = struct.pack("<IQ", ValueType.INT32, 2) + struct.pack("<ii", 4, -5)
    second = struct.pack("<IQ", ValueType.STRING, 1) + text("six")
    nested = struct.pack("<IIQ", ValueType.ARRAY, ValueType.ARRAY, 2) + first + second
    header = read_header(raw_file(tmp_path, metadata=text("k") + nested, n_metadata=1))
    assert header.array("k") == [[4, -5], ["six"]]


def test_version_2_custom_alignment_and_scalar(tmp_path: Path):
    metadata = text("general.alignment") + struct.pack("<II", ValueType.UINT32, 256)
    infos = [info("a", (3,)), info("b", (), 0, 256)]
    header = read_header(
        raw_file(tmp_path, infos=infos, metadata=metadata, n_metadata=1, version=2)
    )
    assert (header.version, header.alignment) == (2, 256)
    assert header.data_offset % 256 == 0
    assert header.tensors["b"].shape == ()
    assert header.tensors["b"].nbytes == 4


def test_no_tensors_at_all(tmp_path: Path):
    header = read_header(raw_file(tmp_path, data=0))
    assert header.tensors == {}
    assert header.metadata == {}


def test_types_are_named(tmp_path: Path):
    path = raw_file(tmp_path, infos=[info("t", (256,), 10)])
    assert read_header(path).tensors["t"].type_name == "Q2_K"


def peak_memory(path: Path) -> int:
    tracemalloc.start()
    try:
        read_header(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_20_gb_file_opens_at_once(tmp_path: Path):
    path = tmp_path / "large.gguf"
    shapes = {f"cond.layers.{i}.feed_forward.w2.weight": (4608, 12288) for i in range(360)}
    size = files.write_sparse_gguf(path, shapes)
    assert size > 20e9
    assert len(read_header(path).tensors) == 360
    assert cpu_seconds(lambda: read_header(path)) < 0.05
    assert peak_memory(path) < 50e6


def test_a_large_vocabulary_is_skipped(tmp_path: Path):
    path = tmp_path / "encoder.gguf"
    tokens = [f"token{i}" for i in range(151_936)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [f"to ken{i}" for i in range(151_387)],
        "tokenizer.ggml.eos_token_id": 7,
    }
    files.write_sparse_gguf(path, {"token_embd.weight": (64, 64)}, metadata, arch="qwen3vl")
    header = read_header(path)
    assert header.metadata["tokenizer.ggml.tokens"].count == len(tokens)
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 7
    assert cpu_seconds(lambda: read_header(path)) < 0.3
    assert peak_memory(path) < 50e6
    assert header.array("tokenizer.ggml.tokens") == tokens
    assert header.array("tokenizer.ggml.token_type") == metadata["tokenizer.ggml.token_type"]
