"""Safetensors headers, read with bounds; tensor data is not touched.

Layout of a file: length of the header (u64, little endian), the header as JSON
``{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {text: text}}``, then the data,
whose offsets count from the header's end. Source: the safetensors format description.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

from ..ops.errors import CorruptFileError, TruncatedFileError
from .files import DOWNLOAD_AGAIN, RawTensor, SourceFile

MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 32
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


def read_safetensors_header(
    path: Path,
) -> tuple[SourceFile, dict[str, RawTensor], dict[str, str]]:
    """(the file, its tensors in the order of their data, its metadata).

    Raises TruncatedFileError (the file ends before its data: a broken download) and
    CorruptFileError (no safetensors header, or one that contradicts itself).
    """
    with open(path, "rb") as stream:
        file = SourceFile.of(path, stream)
        head = stream.read(8)
        if len(head) < 8:
            raise _truncated(file, "the length of the header", 8)
        (length,) = struct.unpack("<Q", head)
        first = stream.read(1)
        if not 2 <= length <= MAX_HEADER or first not in (b"{", b""):
            raise CorruptFileError(
                "this is no safetensors file",
                file=path,
                found=f"a header of {length} bytes that starts with {first!r}",
                needed=f"JSON of 2 to {MAX_HEADER} bytes",
                hint=DOWNLOAD_AGAIN,
            )
        if 8 + length > file.size:
            raise _truncated(file, "the header", 8 + length)
        text = first + stream.read(length - 1)
    entries = _parse(text, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_extents(file, tensors)
    return file, {tensor.key: tensor for tensor in tensors}, metadata


def parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted file; CorruptFileError if it is none, or names repeat."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice!r} occurs twice")
        return items

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{what} is no usable JSON: {error}", file=path, hint=DOWNLOAD_AGAIN
        ) from error
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{what} is no JSON object", file=path, found=type(value).__name__, hint=DOWNLOAD_AGAIN
        )
    return value


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    return parse_json(text, path, "the header")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CorruptFileError(
            "__metadata__ is no map of texts",
            file=path,
            found=repr(value)[:80],
            hint=DOWNLOAD_AGAIN,
        )
    return value


def _tensor(file: SourceFile, name: str, entry: Any, data_start: int) -> RawTensor:
    """The tensor that a header entry describes, or CorruptFileError."""

    def corrupt(message: str, found: object, needed: object) -> CorruptFileError:
        return CorruptFileError(
            message, file=file.path, tensor=name, found=found, needed=needed, hint=DOWNLOAD_AGAIN
        )

    if not isinstance(entry, dict):
        raise corrupt("its description is no object", repr(entry)[:80], "dtype, shape, offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise corrupt("unknown dtype", repr(dtype)[:80], "a safetensors dtype")
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise corrupt("impossible shape", repr(shape)[:80], "a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt("impossible offsets", repr(offsets)[:80], "[begin, end]")
    bits = math.prod(shape) * _BITS[dtype]
    begin, end = offsets
    if 8 * (end - begin) != bits:
        raise corrupt(
            f"its data does not fit {dtype} {shape}", f"{end - begin} bytes", f"{bits / 8:g} bytes"
        )
    return RawTensor(file, name, dtype, tuple(shape), data_start + begin, end - begin)


def _naturals(value: Any) -> bool:
    """A list of integers from 0 to 2^63."""
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in value)


def _check_extents(file: SourceFile, tensors: list[RawTensor]) -> None:
    """Every tensor lies in the file, and no two share a byte; ``tensors`` are sorted by offset."""
    for tensor, following in itertools.pairwise(t for t in tensors if t.nbytes):
        if tensor.offset + tensor.nbytes > following.offset:
            raise CorruptFileError(
                f"its data overlaps that of {following.key}",
                file=file.path,
                tensor=tensor.key,
                found=f"{tensor.nbytes} bytes from {tensor.offset} on",
                needed=f"an end before {following.offset}",
                hint=DOWNLOAD_AGAIN,
            )
    cut = next((t for t in tensors if t.offset + t.nbytes > file.size), None)
    if cut is not None:
        end = max(tensor.offset + tensor.nbytes for tensor in tensors)
        raise _truncated(file, "the data of this tensor", end, cut.key)


def _truncated(
    file: SourceFile, what: str, needed: int, tensor: str | None = None
) -> TruncatedFileError:
    return TruncatedFileError(
        f"the file ends inside {what}",
        file=file.path,
        tensor=tensor,
        found=f"{file.size:,} bytes",
        needed=f"{needed:,} bytes",
        hint=DOWNLOAD_AGAIN,
    )
