"""write_gguf: gguf-py reads it back equal, and no failure leaves anything behind."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ideogram4_quant.files import new_file
from ideogram4_quant.files.new_file import OutputExistsError, WriteError
from ideogram4_quant.gguf_loader import (
    TYPE_NUMBERS,
    GGUFSpec,
    GGUFWriteError,
    Typed,
    ValueType,
    read_header,
    write_gguf,
)
from ideogram4_quant.tests import fixtures_files as files

METADATA = {
    "general.architecture": "ideogram4",
    "a.flag": False,
    "a.count": 7,
    "a.minus": -7,
    "a.large": 2**40,
    "a.share": 0.25,
    "a.text": "größe 量",
    "a.texts": ["", "two", "四"],
    "a.integers": [1, -2, 3],
    "a.sections": (24, 20, 20, 0),
    "a.floats": [0.5, 1e-5],
    "a.flags": [True, False],
    "a.small": Typed(ValueType.UINT8, 3),
    "a.precise": Typed(ValueType.FLOAT64, 1e-5),
}


def tensors(seed: int = 0) -> list[tuple[str, tuple[int, ...], int, torch.Tensor]]:
    """Every stored type, odd sizes among them."""
    rng = np.random.default_rng(seed)
    out = []
    for kind, shape in [
        ("Q8_0", (5, 96)),
        ("Q4_0", (3, 32)),
        ("Q4_1", (7, 64)),
        ("Q5_0", (1, 32)),
        ("Q5_1", (2, 32)),
    ]:
        weight = rng.standard_normal(shape, dtype=np.float32)
        blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        name = f"{kind.lower()}.weight"
        out.append((name, shape, TYPE_NUMBERS[kind], torch.from_numpy(blocks)))
    floats = torch.from_numpy(rng.standard_normal((3, 7), dtype=np.float32))
    out.append(("f32", (3, 7), 0, floats))
    out.append(("f16", (3, 7), 1, floats.half()))
    out.append(("bf16.bias", (21,), TYPE_NUMBERS["BF16"], floats.bfloat16().reshape(-1)))
    out.append(("scalar", (), 0, torch.tensor(2.5)))
    out.append(("transposed", (7, 3), 0, floats.t()))
    return out


def no_traces(folder: Path) -> bool:
    return not any(folder.iterdir())


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_gguf_py_reads_it_back(tmp_path: Path):
    path = tmp_path / "out.gguf"
    size = write_gguf(path, tensors(), METADATA)
    assert size == path.stat().st_size
    reader = gguf.GGUFReader(path)
    fields = {k: v for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(fields) == list(METADATA)
    for key, value in METADATA.items():
        plain = value.value if isinstance(value, Typed) else value
        found = fields[key].contents()
        if key == "a.floats":
            assert found == [float(np.float32(item)) for item in plain]
        else:
            assert found == (list(plain) if isinstance(plain, tuple) else plain)
    assert [tensor.name for tensor in reader.tensors] == [item[0] for item in tensors()]
    for tensor, (_, shape, kind, data) in zip(reader.tensors, tensors(), strict=True):
        assert tuple(reversed(tensor.shape.tolist())) == shape
        assert tensor.tensor_type == kind
        assert np.ascontiguousarray(tensor.data).tobytes() == as_bytes(data)


def test_metadata_types(tmp_path: Path):
    path = tmp_path / "out.gguf"
    write_gguf(path, [], METADATA)
    types = {key: field.types for key, field in gguf.GGUFReader(path).fields.items()}
    kinds = gguf.GGUFValueType
    assert types["a.flag"] == [kinds.BOOL]
    assert types["a.count"] == [kinds.UINT32]
    assert types["a.minus"] == [kinds.INT32]
    assert types["a.large"] == [kinds.UINT64]
    assert types["a.share"] == [kinds.FLOAT32]
    assert types["a.small"] == [kinds.UINT8]
    assert types["a.precise"] == [kinds.FLOAT64]
    assert types["a.integers"] == [kinds.ARRAY, kinds.INT32]
    assert types["a.sections"] == [kinds.ARRAY, kinds.UINT32]


def test_same_bytes_as_gguf_py(tmp_path: Path):
    """gguf-py's own writer makes the very same file from the same input."""
    rng = np.random.default_rng(1)
    weights = {
        "a.weight": (rng.standard_normal((4, 64), dtype=np.float32), "Q8_0"),
        "b.weight": (rng.standard_normal((3, 5), dtype=np.float32), "F32"),
        "c.bias": (rng.standard_normal(9, dtype=np.float32), "BF16"),
    }
    metadata = {"x.y": 3, "x.z": "text", "x.floats": [0.5, 2.5]}
    theirs = files.write_gguf_py(tmp_path / "theirs.gguf", weights, metadata)
    ours = tmp_path / "ours.gguf"
    items = []
    for name, (weight, kind) in weights.items():
        qtype = gguf.GGMLQuantizationType[kind]
        data = np.ascontiguousarray(gguf.quants.quantize(weight, qtype)).view(np.uint8)
        items.append((name, weight.shape, int(qtype), torch.from_numpy(data)))
    write_gguf(ours, items, {"general.architecture": "ideogram4", **metadata})
    assert ours.read_bytes() == theirs.read_bytes()


def test_streamed_in_any_order_gives_the_same_bytes(tmp_path: Path):
    items = tensors()
    write_gguf(tmp_path / "a.gguf", items, METADATA)
    specs = [GGUFSpec(name, shape, kind) for name, shape, kind, _ in items]
    held = []

    def stream():
        for name, _, _, tensor in reversed(items):
            held.append(name)
            yield name, tensor

    seen = []
    write_gguf(
        tmp_path / "b.gguf", specs, METADATA, data=stream(), progress=lambda *at: seen.append(at)
    )
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert held == [item[0] for item in reversed(items)]
    total = sum(spec.nbytes for spec in specs)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_alignment_is_obeyed(tmp_path: Path):
    path = tmp_path / "out.gguf"
    write_gguf(path, tensors(), {"general.alignment": 128})
    header = read_header(path)
    assert header.alignment == 128
    assert all(tensor.offset % 128 == 0 for tensor in header.tensors.values())


def test_exists(tmp_path: Path):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match=r"out\.gguf.*exists already"):
        write_gguf(path, tensors(), METADATA)
    assert path.read_bytes() == b"precious"
    write_gguf(path, tensors(), METADATA, overwrite=True)
    assert len(read_header(path).tensors) == len(tensors())
    assert os.listdir(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GGUFSpec("", (2,), 0), "empty or taken"),
        (GGUFSpec("q8_0.weight", (2,), 0), "empty or taken"),
        (GGUFSpec("n" * 64, (2,), 0), "too long"),
        (GGUFSpec("t", (2,), 999), "unknown ggml type"),
        (GGUFSpec("t", (2, 0), 0), "impossible shape"),
        (GGUFSpec("t", (1, 1, 1, 1, 1), 0), "impossible shape"),
        (GGUFSpec("t", (2, 33), 8), "blocks of Q8_0"),
    ],
)
def test_refused_descriptions(tmp_path: Path, spec: GGUFSpec, message: str):
    items = [*tensors(), (spec.name, spec.shape, spec.ggml_type, torch.zeros(2))]
    with pytest.raises(GGUFWriteError, match=message):
        write_gguf(tmp_path / "out.gguf", items, METADATA)
    assert no_traces(tmp_path)


@pytest.mark.parametrize(("name", "bytes_"), [("n" * 63, 63), ("n" * 64, 64), ("é" * 32, 64)])
def test_names_that_ggml_reads(tmp_path: Path, name: str, bytes_: int):
    """ggml's C reader takes 63 bytes (findings/gguf-name-length.sh); gguf-py would write any."""
    items = [(name, (2,), 0, torch.zeros(2))]
    if bytes_ < 64:
        write_gguf(tmp_path / "out.gguf", items, METADATA)
        assert [t.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors] == [name]
        return
    with pytest.raises(GGUFWriteError, match=rf"{name}.*found {bytes_}, needed at most 63 bytes"):
        write_gguf(tmp_path / "out.gguf", items, METADATA)


@pytest.mark.parametrize(
    "value", [None, object(), [], [1, "two"], {"a": 1}, 2**70, Typed(ValueType.UINT8, 300)]
)
def test_refused_metadata(tmp_path: Path, value: object):
    with pytest.raises(GGUFWriteError, match="metadata 'k'"):
        write_gguf(tmp_path / "out.gguf", [], {"k": value})
    assert no_traces(tmp_path)


@pytest.mark.parametrize("alignment", [0, 24, 1.0, "32"])
def test_refused_alignment(tmp_path: Path, alignment: object):
    with pytest.raises(GGUFWriteError, match="alignment"):
        write_gguf(tmp_path / "out.gguf", [], {"general.alignment": alignment})


def spec_and(*data: tuple[str, torch.Tensor]):
    return {
        "tensors": [GGUFSpec("a", (4,), 0), GGUFSpec("b", (32,), 8)],
        "metadata": {},
        "data": iter(data),
    }


GOOD_A = ("a", torch.zeros(4))
GOOD_B = ("b", torch.zeros(34, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (spec_and(GOOD_A), "1 tensors got no data"),
        (spec_and(GOOD_A, GOOD_A), "came twice"),
        (spec_and(GOOD_A, ("c", torch.zeros(1))), "not announced"),
        (spec_and(("a", torch.zeros(5))), "does not match"),
        (spec_and(("a", torch.zeros(8, dtype=torch.float16))), "does not match"),
        (spec_and(GOOD_A, ("b", torch.zeros(33, dtype=torch.uint8))), "does not match"),
        (spec_and(("b", torch.zeros(17, dtype=torch.float16))), "does not match"),
    ],
)
def test_refused_data(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(GGUFWriteError, match=message):
        write_gguf(tmp_path / "out.gguf", **arguments)
    assert no_traces(tmp_path)


def test_an_interrupted_source_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")

    def broken():
        yield GOOD_A
        raise KeyboardInterrupt

    specs = spec_and()["tensors"]
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, specs, {}, data=broken(), overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_errors_of_the_source_keep_their_type(tmp_path: Path):
    def broken():
        raise FileNotFoundError("the source is gone")
        yield

    with pytest.raises(FileNotFoundError, match="the source is gone"):
        write_gguf(tmp_path / "out.gguf", [GGUFSpec("a", (4,), 0)], {}, data=broken())
    assert no_traces(tmp_path)


def test_a_full_disk_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new_file.os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        write_gguf(tmp_path / "out.gguf", tensors(), METADATA)
    assert no_traces(tmp_path)


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(WriteError, match="folder does not exist"):
        write_gguf(tmp_path / "missing" / "out.gguf", [], {})


def test_a_link_keeps_pointing(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "real.gguf"
    target.write_bytes(b"old")
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    write_gguf(link, tensors(), METADATA, overwrite=True)
    assert link.is_symlink()
    assert len(read_header(target).tensors) == len(tensors())
