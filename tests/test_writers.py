"""The safetensors writer: whole files or none, and every other reader agrees."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from ideogram4_quant.checkpoint.writers import (
    OutputExistsError,
    TensorSpec,
    WriteError,
    write_safetensors,
)
from ideogram4_quant.files import new_file

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
]


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def _sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randn(shape, generator=generator).mul(50).abs().to(dtype)


@pytest.fixture
def some() -> dict[str, torch.Tensor]:
    return {
        "b.odd": _sample(torch.int8, (3, 5)),
        "a.scale": _sample(torch.float32, (3, 1)),
        "a.norm": _sample(torch.bfloat16, (7,)),
        "json": torch.tensor(list(b'{"x": 1}!'), dtype=torch.uint8),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4)], ids=str)
def test_the_library_reads_back_every_dtype(tmp_path, dtype, shape):
    path = tmp_path / "f.safetensors"
    tensor = _sample(dtype, shape)
    size = write_safetensors(path, {"x": tensor}, {"format": "pt"})
    back = load_file(path)["x"]
    assert size == path.stat().st_size
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert _bytes(back) == _bytes(tensor)


def test_non_contiguous_tensors_are_written_row_major(tmp_path):
    path = tmp_path / "f.safetensors"
    tensor = _sample(torch.float32, (4, 6)).t()[::2]
    write_safetensors(path, {"x": tensor})
    assert torch.equal(load_file(path)["x"], tensor)


def test_header_and_every_tensor_are_aligned(tmp_path, some):
    path = tmp_path / "f.safetensors"
    write_safetensors(path, some, {"é": "ü"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"é": "ü"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % some[name].element_size() == 0


def test_data_may_come_in_any_order_and_bytes_depend_on_the_specs_alone(tmp_path, some):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in some.items()]
    write_safetensors(one, specs, {"b": "2", "a": "1"}, data=some.items())
    backwards = reversed(list(some.items()))
    write_safetensors(two, iter(specs), {"a": "1", "b": "2"}, data=backwards)
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_names_and_shapes_round_trip(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("any") / "f.safetensors"
    tensors = {n: _sample(dtype, tuple(shape)) for n, (dtype, shape) in wanted.items()}
    write_safetensors(path, tensors)
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(_bytes(back[name]) == _bytes(tensors[name]) for name in tensors)


def test_progress_counts_bytes_to_the_total(tmp_path, some):
    seen = []
    write_safetensors(tmp_path / "f", some, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in some.values())
    assert [t for _, t in seen] == [total] * len(some)
    assert seen[-1][0] == total
    assert sorted(seen) == seen


def test_existing_files_stay_unless_asked(tmp_path, some):
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"f\.safetensors: exists already.*--overwrite"):
        write_safetensors(path, some)
    assert path.read_bytes() == b"mine"
    write_safetensors(path, some, overwrite=True)
    assert load_file(path).keys() == some.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "f.safetensors"

    def data():
        path.write_bytes(b"other")
        yield "x", torch.zeros(4)

    with pytest.raises(OutputExistsError, match="appeared"):
        write_safetensors(path, [TensorSpec("x", torch.float32, (4,))], data=data())
    assert path.read_bytes() == b"other"
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_links_are_followed(tmp_path, some):
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(real / "f.safetensors")
    write_safetensors(link, some)
    assert link.is_symlink()
    assert load_file(real / "f.safetensors").keys() == some.keys()


@pytest.mark.parametrize(
    ("specs", "data", "message"),
    [
        ([("x", (2,)), ("x", (2,))], [], "tensor x: the name is taken"),
        ([("__metadata__", (2,))], [], "tensor __metadata__: the name is taken"),
        ([("x", (2, -1))], [], "tensor x: negative size"),
        ([("x", (2,))], [("x", torch.zeros(3))], r"tensor x: .*\[3\].*\[2\]"),
        ([("x", (2,))], [("x", torch.zeros(2).half())], r"float16 \[2\].*float32 \[2\]"),
        ([("x", (2,))], [("y", torch.zeros(2))], "tensor y: data for a tensor that was not"),
        ([("x", (2,))], [("x", torch.zeros(2))] * 2, "tensor x: data came twice"),
        ([("x", (2,)), ("y", (1,))], [("y", torch.zeros(1))], "tensor x: 1 tensors got no data"),
    ],
)
def test_contradictions_are_named_and_nothing_is_left(tmp_path, specs, data, message):
    path = tmp_path / "f.safetensors"
    announced = [TensorSpec(name, torch.float32, shape) for name, shape in specs]
    with pytest.raises(WriteError, match=message):
        write_safetensors(path, announced, data=data)
    assert list(tmp_path.iterdir()) == []


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(WriteError, match="metadata 'a' is not text"):
        write_safetensors(tmp_path / "f", {}, {"a": 1})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_exception_from_the_data_leaves_nothing(tmp_path, error):
    def data():
        yield "x", torch.zeros(2)
        raise error

    specs = [TensorSpec("x", torch.float32, (2,)), TensorSpec("y", torch.float32, (2,))]
    with pytest.raises(error):
        write_safetensors(tmp_path / "f", specs, data=data())
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_to_read_is_not_blamed_on_the_output(tmp_path):
    def data():
        raise OSError(errno.EIO, "cable pulled")
        yield

    with pytest.raises(OSError, match="cable pulled") as caught:
        write_safetensors(tmp_path / "f", [TensorSpec("x", torch.float32, (2,))], data=data())
    assert not isinstance(caught.value, WriteError)


def test_a_full_disk_is_told_before_the_work(tmp_path, some, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(new_file.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(WriteError, match=r"not enough free space.*found 10 bytes"):
        write_safetensors(tmp_path / "f", some)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path):
    """A real refusal by the system: the process may write 64 KiB a file."""
    script = f"""
        import resource, signal, torch
        from ideogram4_quant.checkpoint.writers import write_safetensors, WriteError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            write_safetensors({str(tmp_path / "f")!r}, {{"x": torch.zeros(100_000)}})
        except WriteError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert "cannot be written: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_enospc_mid_write_becomes_a_write_error(tmp_path, monkeypatch):
    class Full:
        def seek(self, offset):
            return offset

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = new_file.NewFile(Full(), tmp_path / "f")
    with pytest.raises(WriteError, match=r"No space left on device.*disk is full"):
        file.write_at(0, b"x")


def test_partial_writes_go_on_where_they_stopped(tmp_path):
    class Slow:
        def __init__(self):
            self.got = b""

        def seek(self, offset):
            return offset

        def write(self, data):
            self.got += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    new_file.NewFile(slow, tmp_path / "f").write_at(0, b"0123456789")
    assert slow.got == b"0123456789"


def test_missing_folder_folder_as_file_and_no_permission(tmp_path, some, monkeypatch):
    with pytest.raises(WriteError, match="folder does not exist"):
        write_safetensors(tmp_path / "no" / "f", some)
    with pytest.raises(WriteError, match="is a folder"):
        write_safetensors(tmp_path, some)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(WriteError, match=r"Permission denied\. Choose a folder you may write to"):
        write_safetensors(tmp_path / "f", some)


def test_kill_mid_write_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "f.safetensors"
    script = f"""
        import os, signal, torch
        from ideogram4_quant.checkpoint.writers import TensorSpec, write_safetensors
        def data():
            yield "x", torch.zeros(1000)
            os.kill(os.getpid(), {int(signal.SIGKILL)})
        specs = [TensorSpec("x", torch.float32, (1000,)), TensorSpec("y", torch.float32, (1000,))]
        write_safetensors({str(path)!r}, specs, data=data())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    write_safetensors(path, {"x": torch.zeros(2)})  # what the dead process left is in nobody's way
    assert load_file(path)["x"].numel() == 2
