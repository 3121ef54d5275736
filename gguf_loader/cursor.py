"""A forward cursor over a file's first bytes that never reads or allocates beyond a limit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import CHECK_DOWNLOAD, DOWNLOAD_AGAIN, CorruptFileError, TruncatedFileError

MAX_HEADER = 1 << 24  # bytes; a language model's header with 150,000 tokens takes 6 MB
MAX_TEXTS = 1 << 22  # bytes of names and texts in all, those of arrays apart
_STEP = 1 << 20
_FIRST_READ = 1 << 16

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """Reads little-endian values one after the other; ``pos`` is the offset in the file.

    The file is read in steps, so a small header costs one small read. Asking beyond the file's end
    raises TruncatedFileError, beyond ``MAX_HEADER`` CorruptFileError; both happen before anything
    of the asked size is allocated.
    """

    def __init__(self, file: BinaryIO, path: Path, file_size: int) -> None:
        self.path = path
        self.file_size = file_size
        self.pos = 0
        self._file = file
        self._data = bytearray()
        self._texts_left = MAX_TEXTS

    def require(self, size: int, what: str) -> None:
        """Make ``size`` bytes from here on available, or raise."""
        end = self.pos + size
        if end <= len(self._data):
            return
        if end > self.file_size:
            raise TruncatedFileError(
                f"the header ends inside {what}",
                file=self.path,
                found=f"{self.file_size} bytes",
                needed=f"at least {end} bytes",
                hint=DOWNLOAD_AGAIN,
            )
        if end > MAX_HEADER:
            raise CorruptFileError(
                f"the header is too long: {what}",
                file=self.path,
                found=f"{end} bytes",
                needed=f"at most {MAX_HEADER} bytes",
                hint=CHECK_DOWNLOAD,
            )
        target = min(self.file_size, MAX_HEADER, max(end, _FIRST_READ, 2 * len(self._data)))
        while len(self._data) < target:
            piece = self._file.read(min(_STEP, target - len(self._data)))
            if not piece:
                break
            self._data += piece
        if end > len(self._data):
            raise TruncatedFileError(
                "the file became shorter while it was read",
                file=self.path,
                found=f"{len(self._data)} bytes",
                needed=f"{end} bytes",
                hint=DOWNLOAD_AGAIN,
            )

    def u32(self, what: str) -> int:
        return self.unpack(_U32, what)

    def u64(self, what: str) -> int:
        return self.unpack(_U64, what)

    def unpack(self, code: struct.Struct, what: str) -> int | float | bool:
        """One value of ``code``."""
        self.require(code.size, what)
        (value,) = code.unpack_from(self._data, self.pos)
        self.pos += code.size
        return value

    def bytes(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        self.require(size, what)
        self.pos += size
        with memoryview(self._data) as view:
            return bytes(view[self.pos - size : self.pos])

    def text(self, what: str) -> str:
        """A string: its length as 8 bytes, then UTF-8."""
        size = self.u64(what)
        self.require(size, what)  # a short download is told as one
        self._texts_left -= size
        if self._texts_left < 0:
            raise CorruptFileError(
                f"the texts of the header are too long: {what}",
                file=self.path,
                found=f"{size} bytes",
                needed=f"at most {MAX_TEXTS} bytes in all",
                hint=CHECK_DOWNLOAD,
            )
        raw = self.bytes(size, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError(
                f"{what} is not UTF-8",
                file=self.path,
                found=f"{raw[:40]!r} at byte {self.pos - len(raw)}",
                hint=DOWNLOAD_AGAIN,
            ) from error

    def skip(self, size: int, what: str) -> None:
        """Pass over ``size`` bytes."""
        self.require(size, what)
        self.pos += size

    def skip_texts(self, count: int, what: str) -> None:
        """Pass over ``count`` strings, reading their lengths alone (0.1 us each)."""
        self.require(8 * count, what)  # every string takes 8 bytes at least
        data, pos, left = self._data, self.pos, count
        unpack = _U64.unpack_from
        while left:
            try:
                # slot by slot without a bounds check of our own: unpack_from has one
                while left:
                    pos += 8 + unpack(data, pos)[0]
                    left -= 1
            except (struct.error, OverflowError):
                self.pos = pos
                self.require(8, what)  # reads on, or says where the file ends
                data = self._data
        self.pos = pos
        self.require(0, what)
