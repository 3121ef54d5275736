"""Where tensors lie on the disk, and how their bytes come into memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import DOWNLOAD_AGAIN, CheckpointError, TruncatedFileError
from ..gguf_loader import TENSOR_TYPES

# Types of both file formats that are read as they are; blocks of GGUF are read as bytes.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
BLOCK_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values() if kind.block_size > 1}


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when its header was read; a changed one is not read further."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> SourceFile:
        state = os.fstat(file.fileno())
        return cls(path, state.st_size, state.st_mtime_ns)

    def read(self, offset: int, nbytes: int, itemsize: int = 1) -> Tensor:
        """``nbytes`` bytes from ``offset`` on, as uint8, at an address that ``itemsize`` divides.

        Raises CheckpointError if the file changed since it was opened, or while this reads it, or
        cannot be read.
        """
        try:
            return self._read(offset, nbytes)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", file=self.path
            ) from error

    def _check_unchanged(self, file: BinaryIO) -> None:
        if SourceFile.of(self.path, file) != self:
            raise CheckpointError(
                "the file changed after it was opened", file=self.path, hint="Open it again."
            )

    def _room(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:  # a file with a hole may claim any size
            raise CheckpointError(
                "one of its tensors does not fit into memory",
                file=self.path,
                found=f"{nbytes:,} bytes",
                hint="Close other programs, or use a smaller file.",
            ) from error

    def _read(self, offset: int, nbytes: int) -> Tensor:
        with open(self.path, "rb", buffering=0) as file:
            self._check_unchanged(file)
            data = self._room(nbytes)
            rest = memoryview(data.numpy())
            file.seek(offset)
            while rest:  # one call may bring only a part: Linux stops at 2 GiB
                count = file.readinto(rest)
                if not count:
                    raise TruncatedFileError(
                        "the file ends early",
                        file=self.path,
                        found=f"{offset + nbytes - len(rest)} bytes",
                        needed=f"{offset + nbytes} bytes",
                        hint=DOWNLOAD_AGAIN,
                    )
                rest = rest[count:]
            self._check_unchanged(file)
        return data


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a file, as its header describes it; ``shape`` in torch's order.

    ``held``: its bytes, if they were read with the header.
    """

    file: SourceFile
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    held: bytes | None = field(default=None, repr=False, compare=False)

    def read(self) -> Tensor:
        """The stored values; blocks of GGUF as uint8 [..., bytes of a row].

        Raises CheckpointError (a type that torch has not) and what :meth:`SourceFile.read` raises.
        """
        if self.dtype not in BLOCK_TYPES and self.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                "this type is not read",
                file=self.file.path,
                tensor=self.key,
                found=self.dtype,
                needed=f"one of {', '.join(TORCH_DTYPES)}",
            )
        if self.dtype in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.dtype]
            row_bytes = self.shape[-1] // kind.block_size * kind.type_size
            data = self.file.read(self.offset, self.nbytes)
            return data.reshape(*self.shape[:-1], row_bytes)
        dtype = TORCH_DTYPES[self.dtype]
        if self.held is not None:
            data = torch.tensor(list(self.held), dtype=torch.uint8)
        else:
            data = self.file.read(self.offset, self.nbytes, dtype.itemsize)
        return data.view(dtype).reshape(self.shape)
