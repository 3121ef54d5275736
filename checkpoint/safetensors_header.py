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
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CHECK_DOWNLOAD, DOWNLOAD_AGAIN, CorruptFileError, TruncatedFileError, printable
from ..gguf_loader.reader import MAX_NAME
from .files import RawTensor, SourceFile

_FORMAT_LIMIT = 100_000_000  # bytes of a header that the format allows
# Both copies with all their scales take 0.2 MB, and JSON grows up to
# 25-fold in memory, so that a header's size and the number of its values are bounded.
MAX_HEADER = 1 << 22
# A picture in the metadata (modelspec.thumbnail, as base64) may take more; it is one text, which
# grows little in memory: fourfold at most, if a letter in it takes four bytes.
_MAX_WITH_PICTURE = 6 << 20
_MAX_VALUES = 1 << 18  # names and texts; lists and objects
MAX_TENSORS = 1 << 14
_MAX_DIMS = 32
_SHORT_TEXT = 256  # bytes; those of 16384 tensors take 4 MiB
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


Header = tuple[SourceFile, dict[str, RawTensor], dict[str, str]]
"""The file, its tensors in the order of their data, its metadata."""


def read_safetensors_header(path: Path) -> Header:
    """The header of the file at ``path``.

    Raises TruncatedFileError (the file ends before its data: a broken download) and
    CorruptFileError (no safetensors header, or one that contradicts itself).
    """
    with open(path, "rb") as stream:
        return safetensors_header_of(path, stream)


def safetensors_header_of(path: Path, stream: BinaryIO) -> Header:
    """The same of a file that is open at its start; short texts among its tensors are read too."""
    file = SourceFile.of(path, stream)
    head = stream.read(8)
    if len(head) < 8:
        raise _truncated(file, "the length of the header", 8)
    if head.startswith(b"GGUF"):
        raise CorruptFileError(
            "this is no safetensors file",
            file=path,
            found="a GGUF file",
            needed="safetensors",
            hint="Pick the safetensors file.",
        )
    (length,) = struct.unpack("<Q", head)
    first = stream.read(1)
    stream.seek(8)
    if _MAX_WITH_PICTURE < length <= _FORMAT_LIMIT and first == b"{":
        raise CorruptFileError(
            "the header is longer than any model needs",
            file=path,
            found=f"{length:,} bytes",
            needed=f"at most {_MAX_WITH_PICTURE:,}",
            hint="Remove pictures and notes from its metadata, or use another file.",
        )
    if not 2 <= length <= _MAX_WITH_PICTURE or first not in (b"{", b""):
        raise CorruptFileError(
            "this is no safetensors file",
            file=path,
            found=f"a header of {length} bytes that starts with {first!r}",
            needed=f"JSON of 2 to {_MAX_WITH_PICTURE} bytes",
            hint=DOWNLOAD_AGAIN,
        )
    if 8 + length > file.size:
        raise _truncated(file, "the header", 8 + length)
    text = stream.read(length)
    entries = parse_json(text, path, "the header")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        raise CorruptFileError(
            "too many tensors", file=path, found=len(entries), needed=f"at most {MAX_TENSORS}"
        )
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_extents(file, tensors)
    return file, {tensor.key: _with_text(tensor, stream) for tensor in tensors}, metadata


def _with_text(tensor: RawTensor, stream: BinaryIO) -> RawTensor:
    """``tensor`` with its bytes, if it is a description of another (``comfy_quant``).

    There is one a linear, and each would open the file again.
    """
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > _SHORT_TEXT:
        return tensor
    stream.seek(tensor.offset)
    held = stream.read(tensor.nbytes)
    return replace(tensor, held=held) if len(held) == tensor.nbytes else tensor


def parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted file of at most 6 MiB.

    CorruptFileError if it is none, if names repeat, or if it would take far more memory than text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice!r} occurs twice")
        return items

    # cheap upper bounds; a quote inside a text is escaped and opens none
    texts = (text.count(b'"') - text.count(b'\\"')) // 2
    values = max(texts, text.count(b"[") + text.count(b"{"))
    if values > _MAX_VALUES or text.count(b",") > MAX_HEADER // 2:
        raise CorruptFileError(
            f"{what} holds too many values", file=path, needed=f"at most {_MAX_VALUES}"
        )
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in text:  # only an escape can bring half of a surrogate pair
            _check_encodable(value)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{what} is no usable JSON: {printable(str(error))}", file=path, hint=DOWNLOAD_AGAIN
        ) from error
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{what} is no JSON object", file=path, found=type(value).__name__, hint=DOWNLOAD_AGAIN
        )
    return value


def _check_encodable(value: Any) -> None:
    """UnicodeEncodeError for a text that is no UTF-8, one text in memory at a time."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            item.encode("utf-8")
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()


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

    if len(name) > MAX_NAME:
        raise corrupt(
            "a name too long for a tensor", f"{len(name):,} characters", f"at most {MAX_NAME:,}"
        )
    if not isinstance(entry, dict):
        raise corrupt("its description is no object", repr(entry)[:80], "dtype, shape, offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CorruptFileError(
            "unknown dtype",
            file=file.path,
            tensor=name,
            found=repr(dtype)[:80],
            needed=f"one of {', '.join(_BITS)}",
            hint=CHECK_DOWNLOAD,
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise corrupt("impossible shape", repr(shape)[:80], "a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt("impossible offsets", repr(offsets)[:80], "[begin, end]")
    bits = math.prod(shape) * _BITS[dtype]
    begin, end = offsets
    if 8 * (end - begin) != bits:
        raise corrupt(f"its data does not fit {dtype} {shape}", f"{end - begin} bytes", _size(bits))
    return RawTensor(file, name, dtype, tuple(shape), data_start + begin, end - begin)


def _size(bits: int) -> str:
    return f"{-(-bits // 8)} bytes" if bits < 1 << 67 else "more bytes than any disk has"


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
