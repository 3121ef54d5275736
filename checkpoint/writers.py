"""Write safetensors files as a stream: one tensor in memory, whole files only."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.new_file import OutputExistsError, WriteError, check_output, check_space, new_file
from ..files.partial import Partial
from .safetensors_header import MAX_HEADER

__all__ = [
    "OutputExistsError",
    "TensorSpec",
    "WriteError",
    "check_output",
    "check_space",
    "write_safetensors",
]

# Names of the safetensors format, https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of one tensor, known before its data is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[TensorSpec],
    metadata: Mapping[str, str] | None = None,
    *,
    data: Iterable[tuple[str, Tensor]] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    partial: Partial | None = None,
) -> int:
    """Write ``tensors`` to ``path`` as one safetensors file; returns its size in bytes.

    Either ``tensors`` maps names to tensors, or it lists the :class:`TensorSpec` of each and
    ``data`` yields every one of them once, as ``(name, tensor)`` in any order; only the tensor
    just yielded is held. In the file wider dtypes come first, so that every tensor is aligned to
    its own width, and within a width the order is that of ``tensors``: same input, same bytes.
    ``progress(done, total)`` counts bytes of tensor data. With ``partial`` tensors of an earlier
    run may be skipped.

    Raises WriteError (names that repeat, data that does not match its spec, missing data, a full
    disk, no permission) and OutputExistsError; then nothing is left at ``path``.
    """
    if isinstance(tensors, Mapping):
        if data is not None:
            raise TypeError("data goes with a list of TensorSpec, not with a mapping of tensors")
        data = tensors.items()
        specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    else:
        if data is None:
            raise TypeError("a list of TensorSpec needs data")
        specs = list(tensors)
    header, offsets, total = _encode_header(specs, metadata or {}, path)
    by_name = {spec.name: spec for spec in specs}
    with new_file(path, len(header) + total, overwrite=overwrite, partial=partial) as file:
        file.write_at(0, header)
        start = len(header)
        file.resume({name: (start + offsets[name], by_name[name].nbytes) for name in by_name})
        waiting = set(by_name)
        for name, tensor in data:
            _check_item(name, tensor, by_name, waiting, path)
            waiting.remove(name)
            file.write_at(start + offsets[name], tensor_bytes(tensor), part=name)
            if progress is not None:
                left = sum(by_name[each].nbytes for each in file.missing(waiting))
                progress(total - left, total)
        missing = file.missing(waiting)
        if missing:
            raise WriteError(f"{len(missing)} tensors got no data", file=path, tensor=min(missing))
    return len(header) + total


def _encode_header(
    specs: list[TensorSpec], metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[bytes, dict[str, int], int]:
    """(length + JSON bytes, offset of each tensor's data, bytes of all data)."""
    entries: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise WriteError(f"metadata {key!r} is not text", file=path, found=type(value))
        entries["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        if spec.name in entries or spec.name == "__metadata__":
            raise WriteError("the name is taken already", file=path, tensor=spec.name)
        if spec.dtype not in _DTYPES:
            raise WriteError(
                "safetensors has no such type", file=path, tensor=spec.name, found=spec.dtype
            )
        if any(size < 0 for size in spec.shape):
            raise WriteError("negative size", file=path, tensor=spec.name, found=spec.shape)
        offsets[spec.name] = end
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise WriteError(
            "the header is too long", file=path, found=len(text), needed=f"at most {MAX_HEADER}"
        )
    return struct.pack("<Q", len(text)) + text, offsets, end


def _check_item(
    name: str,
    tensor: Tensor,
    specs: Mapping[str, TensorSpec],
    waiting: set[str],
    path: str | os.PathLike[str],
) -> None:
    spec = specs.get(name)
    if spec is None:
        raise WriteError("data for a tensor that was not announced", file=path, tensor=name)
    if name not in waiting:
        raise WriteError("data came twice", file=path, tensor=name)
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise WriteError(
            "the data does not match what was announced",
            file=path,
            tensor=name,
            found=f"{tensor.dtype} {list(tensor.shape)}",
            needed=f"{spec.dtype} {list(spec.shape)}",
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, little-endian as on every platform of torch."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
