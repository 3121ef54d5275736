"""GGUF headers, read with bounds: counts, lengths, types and extents are checked before use.

Only the header is read; tensor data stays on the disk. Layout of the file (version 2 and 3, little
endian)::

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:  key (u64 + UTF-8) | value type u32 | value          (array: type u32, count u64, ...)
    tensors:   name | n_dims u32 | dims u64 x n_dims, fastest first | type u32 | offset u64
    padding to the alignment, then the tensors' data at data_offset + offset

Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DOWNLOAD_AGAIN, CheckpointError, CorruptFileError, TruncatedFileError
from .cursor import Cursor
from .metadata import ArrayRef, check_built, decode_array, read_metadata
from .types import TENSOR_TYPES

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME = 1 << 10  # characters, so that what is done with a name takes no time; ggml allows 63
_MAX_ENTRIES = 1 << 14  # tensors, and metadata keys; the largest models have a few thousand
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor; ``shape`` in torch's order ([N, K]), ``offset`` counted from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        """ggml's name of the type, such as ``Q4_K``."""
        return TENSOR_TYPES[self.ggml_type].name


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself. ``metadata`` holds scalars, texts and :class:`ArrayRef`."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    alignment: int
    data_offset: int
    file_size: int
    mtime_ns: int

    def array(self, key: str) -> list[Any]:
        """The elements of the metadata array ``key``, read from the file now.

        Raises KeyError (no such array), CheckpointError (the file changed since it was opened, or
        cannot be read) and CorruptFileError (texts that are no UTF-8, more than 2^19 elements).
        """
        ref = self.metadata[key]
        if not isinstance(ref, ArrayRef):
            raise KeyError(f"{key} is no array")
        check_built(ref, self.path, key)
        try:
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                if (state.st_size, state.st_mtime_ns) != (self.file_size, self.mtime_ns):
                    raise self._changed()
                file.seek(ref.offset)
                data = file.read(ref.nbytes)
            return decode_array(data, 0, ref.type, ref.count, self.path, key)[0]
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", file=self.path
            ) from error
        except (struct.error, ValueError) as error:  # lengths that the header did not have
            raise self._changed() from error

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            "the file changed after it was opened", file=self.path, hint="Open it again."
        )


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of the GGUF file at ``path``; tensor data is not touched.

    Raises TruncatedFileError (the file ends early: a broken download), CorruptFileError (fields
    that contradict each other or the file's size) and CheckpointError (GGUF version 1 and big
    endian files, which are not read).
    """
    path = Path(path)
    with open(path, "rb") as file:
        return header_of(path, file)


def header_of(path: Path, file: BinaryIO) -> GGUFHeader:
    """The same of a file that is open at its start."""
    state = os.fstat(file.fileno())
    cursor = Cursor(file, path, state.st_size)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensors", 24)
    n_metadata = _read_count(cursor, "metadata keys", 13)
    metadata = read_metadata(cursor, n_metadata)
    alignment = _alignment(metadata, path)
    infos = _read_infos(cursor, n_tensors)
    data_offset = cursor.pos + -cursor.pos % alignment
    tensors = {
        name: _checked(name, dims, kind, offset, data_offset, alignment, path)
        for name, (dims, kind, offset) in infos.items()
    }
    _check_extents(list(tensors.values()), state.st_size, path)
    return GGUFHeader(
        path, version, metadata, tensors, alignment, data_offset, state.st_size, state.st_mtime_ns
    )


def _read_version(cursor: Cursor) -> int:
    magic = cursor.bytes(4, "the magic number")
    if magic != MAGIC:
        raise CorruptFileError(
            "this is no GGUF file", file=cursor.path, found=repr(magic), needed=repr(MAGIC)
        )
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        message, found = "this GGUF file is big endian", "big endian"
    else:
        message, found = "this GGUF version cannot be read", f"version {version}"
    raise CheckpointError(
        message,
        file=cursor.path,
        found=found,
        needed="version 2 or 3, little endian",
        hint="Convert the model again with a current converter.",
    )


def _read_count(cursor: Cursor, what: str, smallest: int) -> int:
    """A number of entries, possible in this file: each takes ``smallest`` bytes at least."""
    count = cursor.u64(f"the number of {what}")
    room = (cursor.file_size - cursor.pos) // smallest
    if count > min(_MAX_ENTRIES, room):
        # A count that would be fine in a longer file means a short download, not damage.
        error = TruncatedFileError if room < count <= _MAX_ENTRIES else CorruptFileError
        raise error(
            f"the header promises too many {what}",
            file=cursor.path,
            found=count,
            needed=f"at most {min(_MAX_ENTRIES, room)}",
            hint=DOWNLOAD_AGAIN,
        )
    return count


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise CorruptFileError(
            "general.alignment is unusable",
            file=path,
            found=value,
            needed=f"a power of two up to {_MAX_ALIGNMENT}",
            hint=DOWNLOAD_AGAIN,
        )
    return value


def _read_infos(cursor: Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """name -> (dims in the file's order, type, offset from the start of the data)."""
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for index in range(count):
        name = cursor.text(f"the name of tensor {index}")
        if not name or name in infos:
            problem = "occurs twice" if name else "has no name"
            raise CorruptFileError(
                f"tensor {index} {problem}", file=cursor.path, tensor=name, hint=DOWNLOAD_AGAIN
            )
        if len(name) > MAX_NAME:
            raise CorruptFileError(
                "a name too long for a tensor",
                file=cursor.path,
                tensor=name,
                found=f"{len(name):,} characters",
                needed=f"at most {MAX_NAME:,}",
            )
        what = f"the description of tensor {name}"
        n_dims = cursor.u32(what)
        if n_dims > MAX_DIMS:
            raise CorruptFileError(
                "too many dimensions",
                file=cursor.path,
                tensor=name,
                found=n_dims,
                needed=f"at most {MAX_DIMS}",
                hint=DOWNLOAD_AGAIN,
            )
        dims = tuple(cursor.u64(what) for _ in range(n_dims))
        infos[name] = (dims, cursor.u32(what), cursor.u64(what))
    return infos


def _checked(
    name: str,
    dims: tuple[int, ...],
    kind: int,
    offset: int,
    data_offset: int,
    alignment: int,
    path: Path,
) -> GGUFTensor:
    """The tensor that a description stands for, or CorruptFileError."""

    def corrupt(message: str, found: object, needed: object) -> CorruptFileError:
        return CorruptFileError(
            message, file=path, tensor=name, found=found, needed=needed, hint=DOWNLOAD_AGAIN
        )

    tensor_type = TENSOR_TYPES.get(kind)
    if tensor_type is None:
        raise corrupt("unknown tensor type", kind, f"a ggml type up to {max(TENSOR_TYPES)}")
    elements = math.prod(dims)
    if not 0 < elements < 1 << 63:
        raise corrupt("impossible dimensions", list(dims), "positive ones, below 2^63 in all")
    row = dims[0] if dims else 1
    if row % tensor_type.block_size:
        raise corrupt(
            f"rows do not divide into blocks of {tensor_type.name}",
            f"{row} elements a row",
            f"a multiple of {tensor_type.block_size}",
        )
    if offset % alignment:
        raise corrupt("the offset is not aligned", offset, f"a multiple of {alignment}")
    nbytes = elements // tensor_type.block_size * tensor_type.type_size
    return GGUFTensor(name, dims[::-1], kind, data_offset + offset, nbytes)


def _check_extents(tensors: list[GGUFTensor], file_size: int, path: Path) -> None:
    """Every tensor lies in the file, and no two share a byte."""
    tensors = sorted(tensors, key=lambda tensor: tensor.offset)
    for tensor, following in itertools.pairwise(tensors):
        if tensor.offset + tensor.nbytes > following.offset:
            raise CorruptFileError(
                f"its data overlaps that of {following.name}",
                file=path,
                tensor=tensor.name,
                found=f"{tensor.nbytes} bytes from {tensor.offset} on",
                needed=f"an end before {following.offset}",
                hint=DOWNLOAD_AGAIN,
            )
    cut = next((t for t in tensors if t.offset + t.nbytes > file_size), None)
    if cut is not None:
        raise TruncatedFileError(
            "the file ends before this tensor does",
            file=path,
            tensor=cut.name,
            found=f"{file_size:,} bytes",
            needed=f"{tensors[-1].offset + tensors[-1].nbytes:,} bytes",
            hint=DOWNLOAD_AGAIN,
        )
