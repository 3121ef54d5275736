"""Unfinished files that can be gone on with: which parts are done, and what was noted of them.

``OUT.partial`` holds the bytes of the file to be; after its last byte come lines of JSON. The first
one names the size and a fingerprint of everything that decides the bytes; each other one says that
a part is written, with its CRC-32, or notes something beside it. A line that a kill cut short does
not count, and a part whose bytes are not those of its CRC (a power cut) is written again.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path

from ..errors import CheckpointError
from .pieces import pieces

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class ResumeError(CheckpointError):
    """An unfinished file that cannot be gone on with: of other input, other options, or in use."""


def partial_path(target: Path) -> Path:
    """Where the unfinished file lies: beside ``target``."""
    return target.with_name(target.name + ".partial")


def check_unfinished(target: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ResumeError if an unfinished file is there and nothing was said about it."""
    if partial_path(target).exists() and not resume and not overwrite:
        raise ResumeError(
            "is an unfinished file of an earlier run",
            file=partial_path(target),
            hint="Go on with it (--resume), or delete it.",
        )


class Partial:
    """How far a file has come.

    ``fingerprint``: of the input and all options. ``resume``: go on with an unfinished file if one
    is there. While the file is open, ``finished`` names its parts that are done and checked, and
    ``notes`` what was noted; ``skip`` says that such a part will not be written again.
    """

    def __init__(self, fingerprint: str, *, resume: bool = False) -> None:
        self.fingerprint = fingerprint
        self.resume = resume
        self.finished: set[str] = set()
        self.skipped: set[str] = set()
        self.notes: dict[str, object] = {}
        self._crcs: dict[str, int] = {}
        self._file: RawIOBase | None = None

    def start(self, file: RawIOBase, target: Path, size: int) -> None:
        """Take over ``file``, new (of no bytes) or unfinished. Raises ResumeError."""
        _lock(file, target)
        head = {"size": size, "fingerprint": self.fingerprint}
        if file.seek(0, os.SEEK_END) == 0:
            file.truncate(size)
        else:
            self._read(file, target, size, head)
        self._file, self._size = file, size
        if not self._crcs and not self.notes:
            file.truncate(size)
            self._append(head)

    def confirm(self, places: Mapping[str, tuple[int, int]]) -> None:
        """Fill ``finished`` with the parts, at (offset, bytes), whose bytes are those written."""
        for name, crc in self._crcs.items():
            if name in places and self._crc(*places[name]) == crc:
                self.finished.add(name)

    def skip(self, name: str) -> None:
        """This part stays as it is."""
        self.skipped.add(name)

    def done(self, name: str, data: bytes | memoryview) -> None:
        """``data`` was written as part ``name``."""
        self._append({"part": name, "crc": zlib.crc32(data)})

    def note(self, key: str, value: object) -> None:
        """Keep something JSON-ready for whoever goes on."""
        self._append({"note": key, "value": value})

    def _append(self, record: Mapping[str, object]) -> None:
        line = _line(record)
        self._file.seek(0, os.SEEK_END)
        while line:
            line = line[self._file.write(line) :]

    def _read(self, file: RawIOBase, target: Path, size: int, head: Mapping[str, object]) -> None:
        def refused(what: str) -> ResumeError:
            return ResumeError(
                what,
                file=partial_path(target),
                hint="Give the same source and options as then, or delete it and start anew.",
            )

        file.seek(size)
        first, *lines = _lines(file)
        if not first and file.seek(0, os.SEEK_END) <= size:
            if file.seek(0, os.SEEK_END) == size:
                return  # killed before the first line: nothing is done
            raise refused("is an unfinished file of another size")
        if not first and self._is_cut(file, size, head):
            return  # killed within the first line: nothing is done
        try:
            if json.loads(first) != head:
                raise ValueError
        except (ValueError, RecursionError):
            raise refused("is an unfinished file of another source, or of other options") from None
        end = size + len(first) + 1
        for line in lines:
            try:
                record = json.loads(line)
                if "part" in record:
                    self._crcs[str(record["part"])] = int(record["crc"])
                else:
                    self.notes[str(record["note"])] = record["value"]
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                break
            end += len(line) + 1
        file.truncate(end)  # a line that was cut short

    def _is_cut(self, file: RawIOBase, size: int, head: Mapping[str, object]) -> bool:
        """Whether all that stands behind the data is the beginning of this very head's line."""
        line = _line(head)
        file.seek(size)
        return line.startswith(file.read(len(line)))

    def _crc(self, offset: int, nbytes: int) -> int:
        crc = 0
        self._file.seek(offset)
        for piece in pieces(self._file, nbytes):
            crc = zlib.crc32(piece, crc)
        return crc


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _lines(file: RawIOBase) -> list[bytes]:
    """The whole lines from here to the end of the file; one empty line if there is none."""
    rest = b"".join(pieces(file))
    whole = rest.split(b"\n")[:-1]
    return whole or [b""]


def _lock(file: RawIOBase, target: Path) -> None:
    """Let no second process write the same file; the system frees the lock with the process."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return  # a file system without locks
        raise ResumeError(
            "another process is writing it", file=partial_path(target), hint="Wait for it."
        ) from error
