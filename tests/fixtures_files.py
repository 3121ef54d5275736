"""Model files written by independent code: the safetensors library, gguf-py, and bytes by hand.

Nothing here uses the package's own readers or writers, so that a shared mistake cannot hide.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np


def write_gguf_py(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, str]],
    metadata: dict[str, object] | None = None,
    *,
    arch: str | None = "ideogram4",
) -> Path:
    """A GGUF file from float arrays, quantized by gguf-py: name -> (array, type name)."""
    writer = gguf.GGUFWriter(str(path), arch or "none")
    if arch is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in (metadata or {}).items():
        add_gguf_value(writer, key, value)
    for name, (array, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        if qtype in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.float32 if kind == "F32" else np.float16
            writer.add_tensor(name, array.astype(dtype))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_gguf_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """bool, int, float, str or list with the type that gguf-py chooses for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_sparse_gguf(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    metadata: dict[str, object] | None = None,
    *,
    arch: str = "ideogram4",
) -> int:
    """A GGUF file of Q8_0 tensors whose data are holes: a real header, no disk space. Its size."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in (metadata or {}).items():
        add_gguf_value(writer, key, value)
    qtype = gguf.GGMLQuantizationType.Q8_0
    total = 0
    for name, shape in shapes.items():
        row = gguf.quants.quant_shape_to_byte_shape(shape, qtype)
        nbytes = int(np.prod(row))
        writer.add_tensor_info(name, row, np.dtype(np.uint8), nbytes, raw_dtype=qtype)
        total += nbytes + -nbytes % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = os.path.getsize(path)
    size += -size % 32 + total
    os.truncate(path, size)
    return size
