"""A file appears under its name whole or not at all: every writer of the pack uses this."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file in use cannot be removed anyway
    fcntl = None

from ..errors import CheckpointError, Ideogram4QuantError
from .partial import Partial, ResumeError, check_unfinished, partial_path


class WriteError(CheckpointError):
    """A file that cannot be written as asked; nothing was left under its name."""


class OutputExistsError(WriteError):
    """The output exists already and overwriting was not asked for."""


_HINTS = {
    errno.ENOSPC: "The disk is full: free space, or write to another one.",
    errno.EDQUOT: "The disk quota is used up: free space, or write to another disk.",
    errno.EFBIG: "This file system cannot hold a file of that size (FAT32 ends at 4 GiB).",
    errno.EACCES: "Choose a folder you may write to.",
    errno.EPERM: "Choose a folder you may write to.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
# ERROR_ACCESS_DENIED, _SHARING_VIOLATION, _LOCK_VIOLATION, _USER_MAPPED_FILE: what Windows says
# where a file to be replaced is open, or mapped into a process that has loaded it
_IN_USE = (5, 32, 33, 1224)
_LEFT_FOR = 60  # seconds without a write until a temporary file may be a dead process's


@contextmanager
def _as_write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise OutputExistsError("appeared while it was being written", file=target) from error
    except OSError as error:
        reason = error.strerror or str(error)
        hint = _HINTS.get(error.errno or 0)
        raise WriteError(f"cannot be written: {reason}", file=target, hint=hint) from error


def check_output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    made_of: Iterable[str | os.PathLike[str] | None] = (),
) -> Path:
    """The real path that will be written, links followed; creates nothing.

    Raises OutputExistsError if there is a file and ``overwrite`` is false, WriteError if the path
    is a folder, its folder does not exist, or it is one of the files ``made_of`` that the work
    reads. Long work asks this before it starts.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise WriteError("is a folder", file=target, needed="a file name")
    if not target.parent.is_dir():
        raise WriteError(
            "its folder does not exist", file=target, hint=f"Create {target.parent} first."
        )
    if target.exists() and not overwrite:
        raise OutputExistsError(
            "exists already and is not overwritten unasked",
            file=target,
            hint="Choose another name, or ask for overwriting (--overwrite).",
        )
    for source in made_of if target.exists() else ():
        if source is not None and os.path.exists(source) and os.path.samefile(source, target):
            raise WriteError(
                "the output is one of the files that it is made of",
                file=target,
                hint="It would be lost: choose another name.",
            )
    return target


def make_folder(path: str | os.PathLike[str]) -> None:
    """The folder ``path`` and those above it; WriteError where the system refuses."""
    with _as_write_errors(Path(path)):
        os.makedirs(path, exist_ok=True)


def check_space(target: Path, size: int, *, resume: bool = False) -> None:
    """Raise WriteError unless the disk of ``target`` has ``size`` bytes free.

    With ``resume`` what an unfinished file holds already counts as free.
    """
    free = shutil.disk_usage(target.parent).free
    with suppress(OSError):
        held = partial_path(target).stat()
        free += getattr(held, "st_blocks", 0) * 512 if resume else 0
    if free < size:
        raise WriteError(
            "not enough free space on the disk",
            file=target,
            found=f"{free:,} bytes",
            needed=f"{size:,} bytes",
            hint="Free space, or write to another disk.",
        )


def _replace(temporary: Path, target: Path) -> None:
    """``os.replace``; WriteError where a program holds the old file, which Windows then keeps."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if getattr(error, "winerror", None) not in _IN_USE or not target.exists():
            raise
        raise WriteError(
            "cannot be replaced: a program has it open",
            file=target,
            found=error.strerror,
            hint="Close what uses it (ComfyUI keeps model files open), or choose another name.",
        ) from error


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename; without ``overwrite`` a file that appeared meanwhile wins and an error says so."""
    if overwrite:
        _replace(temporary, target)
    elif os.name == "nt":
        os.rename(temporary, target)  # refuses an existing target by itself
    else:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links (exFAT, some network shares)
            check_output(target)
            os.rename(temporary, target)
        else:
            os.unlink(temporary)
    if os.name != "nt":  # the directory entry must survive a power cut as well
        with suppress(OSError):  # some network file systems cannot sync a folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _temporary(target: Path, suffix: str = "") -> Path:
    """A name of our own beside ``target``; what a killed process left there is removed first."""
    leftover = re.compile(rf"{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.partial(?:\.\w+)?")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if leftover.fullmatch(path.name):
                with suppress(OSError):
                    _remove_unless_in_use(path)
    name = f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial{suffix}"
    return target.with_name(name)


def _remove_unless_in_use(path: Path) -> None:
    """Remove a temporary file whose writer is gone; a living one holds its lock (`_claim`)."""
    if time.time() - path.stat().st_mtime < _LEFT_FOR:
        return
    if fcntl is not None:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.unlink()


def _claim(file: BinaryIO) -> None:
    """Mark a temporary file as in use, until it is closed or the process ends, however it ends."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: then nothing is ever swept there
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class NewFile:
    """The file being written: :meth:`write_at` fills any place of it, in any order."""

    def __init__(self, file: RawIOBase, target: Path, partial: Partial | None = None) -> None:
        self._file = file
        self._target = target
        self._partial = partial

    def resume(self, places: Mapping[str, tuple[int, int]]) -> None:
        """Look which parts an earlier run has written; part -> (offset, bytes)."""
        if self._partial is not None:
            with _as_write_errors(self._target):
                self._partial.confirm(places)

    def missing(self, parts: Collection[str]) -> set[str]:
        """Those of ``parts`` that are not left as they are."""
        return set(parts) - (set() if self._partial is None else self._partial.skipped)

    def write_at(self, offset: int, data: bytes | memoryview, *, part: str | None = None) -> None:
        """Write all of ``data`` at ``offset``; WriteError where the system refuses.

        ``part`` names what a resumed run need not write again.
        """
        rest = memoryview(data)
        with _as_write_errors(self._target):
            self._file.seek(offset)
            while rest:  # one call may take only a part: Linux stops at 2 GiB
                rest = rest[self._file.write(rest) :]
            if part is not None and self._partial is not None:
                self._partial.done(part, data)


@contextmanager
def new_file(
    path: str | os.PathLike[str],
    size: int,
    *,
    overwrite: bool = False,
    partial: Partial | None = None,
) -> Iterator[NewFile]:
    """A binary file of exactly ``size`` bytes to fill; on success it is at ``path``, else not.

    Written under a temporary name in the same folder, flushed to the disk, then renamed. Leaving
    the block by any exception, Ctrl-C too, removes the temporary file, and what a killed process
    left is removed by the next one that writes the same file; with ``partial`` it stays unless the
    data itself was refused, and a later run goes on with it. Raises WriteError (a full disk, no
    permission, on Windows a target that is in use), ResumeError and what :func:`check_output`
    raises.
    """
    target = check_output(path, overwrite=overwrite)
    check_space(target, size, resume=partial is not None and partial.resume)
    if partial is None:
        temporary = _temporary(target)
    else:
        temporary = partial_path(target)
        check_unfinished(target, resume=partial.resume, overwrite=overwrite)
    keep = partial is not None
    try:
        with _as_write_errors(target):
            file = _open(temporary, partial)
        with file:
            with _as_write_errors(target):
                if partial is None:
                    _claim(file)
                    file.truncate(size)
                else:
                    partial.start(file, target, size)
            yield NewFile(file, target, partial)
            with _as_write_errors(target):
                if partial is not None:
                    file.truncate(size)  # without the lines after the end
                written = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
        if written != size:
            raise WriteError(
                "the written length differs from the planned one",
                file=target,
                found=f"{written} bytes",
                needed=f"{size} bytes",
            )
        with _as_write_errors(target):
            _publish(temporary, target, overwrite)
    except Ideogram4QuantError as error:
        keep = keep and isinstance(error, WriteError | ResumeError)
        raise
    finally:
        if not keep:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _open(temporary: Path, partial: Partial | None) -> RawIOBase:
    """A plain open: a name of our own, with the permissions that the user's umask gives.

    Unbuffered, so that no failed write is tried again when the file is closed.
    """
    if partial is not None and not partial.resume:
        temporary.unlink(missing_ok=True)
    resumed = partial is not None and temporary.exists()
    return open(temporary, "r+b" if resumed else "x+b", buffering=0)


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path for code that writes files by itself; on success it becomes ``path``.

    For small results (pictures, tables, caches) that are meant to be written anew: an older file
    stays whole until the new one is. Raises WriteError.
    """
    target = check_output(path, overwrite=True)
    temporary = _temporary(target, target.suffix)
    try:
        with _as_write_errors(target):
            yield temporary
            _replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
