"""GGUF files for the tests of the reader: a valid one by gguf-py, and any other by hand."""

import struct
from pathlib import Path

import numpy as np

from ideogram4_quant.tests import fixtures_files as files

METADATA = {
    "a.flag": True,
    "a.count": 7,
    "a.share": 0.25,
    "a.text": "größe 量",
    "a.integers": [1, -2, 3],
    "a.floats": [0.5, -1.5],
    "a.texts": ["", "two", "drei", "四"],
    "a.flags": [True, False],
}


def tensors() -> dict[str, tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    return {
        "first.weight": (rng.standard_normal((6, 64), dtype=np.float32), "Q8_0"),
        "second.weight": (rng.standard_normal((3, 32), dtype=np.float32), "Q4_0"),
        "half": (rng.standard_normal((5, 7), dtype=np.float32), "F16"),
        "deep": (rng.standard_normal((2, 3, 4, 5), dtype=np.float32), "F32"),
        "brain": (rng.standard_normal((3, 10), dtype=np.float32), "BF16"),
        "bias": (rng.standard_normal(9, dtype=np.float32), "F32"),
    }


def sample(path: Path) -> Path:
    """``tensors`` and ``METADATA`` in a file by gguf-py."""
    return files.write_gguf_py(path, tensors(), METADATA)


def text(value: str | bytes) -> bytes:
    """A length and the bytes, UTF-8 or not."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def info(name="t", dims=(32,), kind=0, offset=0) -> bytes:
    """The description of a tensor."""
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def raw_file(
    tmp_path: Path,
    *,
    infos=(),
    metadata=b"",
    n_metadata=0,
    n_tensors=None,
    version=3,
    data=4096,
    magic=b"GGUF",
) -> Path:
    """A GGUF file by hand, right or wrong."""
    count = len(infos) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, count, n_metadata) + metadata + b"".join(infos)
    path = tmp_path / "raw.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path
