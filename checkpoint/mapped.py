"""Model files mapped into memory: weights lie in the page cache, which the system may take back.

What is read this way is a private view of the file's bytes, no copy. A file that another program
cuts short ends a process that touches the pages beyond its new end (SIGBUS), whoever mapped it:
torch, safetensors and ComfyUI's own loader stand no better. So the state of a mapped file is looked
at again (:meth:`MappedFile.check`, a system call of a microsecond) before its weights are used, and
:meth:`MappedFile.read_into` brings bytes in without touching the mapping at all: there a file that
was cut is an error whenever it happens. A file that was deleted or replaced under its name stays
whole for whoever has it open; on Windows neither is possible while it is mapped.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, TruncatedFileError
from ..ops.layouts.weight import MAPPED
from .files import RawTensor, SourceFile

logger = logging.getLogger(__name__)

_AGAIN = "Load the model again once the file is whole."


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a tensor lie, as long as nobody has written to it."""

    file: MappedFile
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class MappedFile(SourceFile):
    """A file whose reads are views of one private mapping; writing to them changes no file."""

    handle: BinaryIO | None = None
    view: mmap.mmap | None = None
    lock: Lock = field(default_factory=Lock)  # of the handle's position

    @classmethod
    def over(cls, source: SourceFile) -> SourceFile:
        """``source`` mapped; as it is, with a line in the log, where the system cannot map it.

        Raises CheckpointError if the file changed since its header was read, or cannot be opened.
        """
        try:
            handle = open(source.path, "rb", buffering=0)  # noqa: SIM115  (open as long as mapped)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", file=source.path
            ) from error
        if SourceFile.of(source.path, handle) != source:
            handle.close()
            raise CheckpointError(
                "the file changed after it was opened", file=source.path, hint="Open it again."
            )
        try:
            view = mmap.mmap(handle.fileno(), source.size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            handle.close()
            logger.warning(
                "%s cannot be mapped (%s): its weights are copied, which takes the file's size in "
                "memory",
                source.path,
                error,
            )
            return source
        return cls(source.path, source.size, source.mtime_ns, handle, view)

    def check(self) -> None:
        """CheckpointError if the file is no longer as it was when it was mapped."""
        state = os.fstat(self.handle.fileno())
        if state.st_size < self.size:
            raise TruncatedFileError(
                "the file was cut short while its weights were in use",
                file=self.path,
                found=f"{state.st_size:,} bytes",
                needed=f"{self.size:,} bytes",
                hint=_AGAIN,
            )
        if (state.st_size, state.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError(
                "the file was changed while its weights were in use", file=self.path, hint=_AGAIN
            )

    def read(self, offset: int, nbytes: int, itemsize: int = 1) -> Tensor:
        """A view where its address suits ``itemsize``, else a copy."""
        self.check()
        if not nbytes or offset % itemsize:
            data = self._room(nbytes)
            self.read_into(offset, data)
            return data
        data = torch.frombuffer(self.view, dtype=torch.uint8, count=nbytes, offset=offset)
        setattr(data.untyped_storage(), MAPPED, Origin(self, offset, nbytes))
        return data

    def read_into(self, offset: int, out: Tensor) -> None:
        """Fill ``out`` (uint8, contiguous, on the CPU) with the file's bytes from ``offset`` on.

        Raises TruncatedFileError where the file ends before, and CheckpointError where it cannot be
        read or was changed since it was mapped.
        """
        rest = memoryview(out.numpy())
        try:
            with self.lock:
                self.handle.seek(offset)
                while rest:
                    count = self.handle.readinto(rest)
                    if not count:
                        break
                    rest = rest[count:]
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", file=self.path
            ) from error
        self.check()
        if rest:
            raise TruncatedFileError(
                "the file ends early",
                file=self.path,
                found=f"{len(rest):,} bytes less",
                hint=_AGAIN,
            )


class FileMapping:
    """The files that one load maps, each once."""

    def __init__(self) -> None:
        self._files: dict[Path, SourceFile] = {}

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """Those that could be mapped."""
        return tuple(file for file in self._files.values() if isinstance(file, MappedFile))

    def over(self, raw: RawTensor) -> RawTensor:
        """The same stored tensor in the mapped file."""
        if raw.file.path not in self._files:
            self._files[raw.file.path] = MappedFile.over(raw.file)
        return replace(raw, file=self._files[raw.file.path], held=None)


def origin(tensor: Tensor) -> Origin | None:
    """Where the bytes of a plain tensor lie in a mapped file; None for one with memory of its own.

    A part of a mapped tensor has none either: its memory begins elsewhere.
    """
    found = getattr(tensor.untyped_storage(), MAPPED, None)
    whole = found is not None and tensor.nbytes == found.nbytes and tensor.is_contiguous()
    return found if whole else None
