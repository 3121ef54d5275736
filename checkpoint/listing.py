"""The model files that some folders hold, and the way back from a name to a path.

A name comes from a workflow, so from anyone: it is only ever looked up in a fresh listing and
never joined to a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from ..errors import CheckpointError

EXTENSIONS = (".safetensors", ".sft", ".gguf")
# A sharded or two-folder model is one entry: the folder that one of these lies in.
_INDEX_SUFFIX = ".safetensors.index.json"
_COPY_FOLDERS = ("transformer", "unconditional_transformer")
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\<>:"|?*]')
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}
_MAX_NAME = 200  # bytes: room for the ending of an unfinished file


@dataclass(frozen=True)
class Listing:
    """Names (with forward slashes, as workflows carry them between systems) and their paths."""

    kind: str
    roots: tuple[str, ...]
    paths: dict[str, Path]

    @property
    def names(self) -> list[str]:
        return sorted(self.paths, key=str.casefold)

    @property
    def choices(self) -> list[str]:
        """For a node's list: the names, or where to put a file if there is none."""
        return self.names or [f"(no file in models/{self.kind} yet)"]

    @property
    def folder(self) -> str:
        """Where to put a file: the folder named after the kind, which hosts may list behind others.

        CheckpointError where the host has no folder of this kind.
        """
        if not self.roots:
            raise CheckpointError(f"no {self.kind} folder is set up in ComfyUI")
        return next((root for root in self.roots if Path(root).name == self.kind), self.roots[0])

    def problem(self, name: str | None, wanted: str = "") -> bool | str:
        """For a node's validation: True, or what is wrong with the name and what to do.

        None, the value of an input that another node will fill in, is no problem yet. wanted: the
        file that most people want here, and where it is published.
        """
        if name is None or name.replace("\\", "/") in self.paths:
            return True
        download = f" Most people want {wanted}." if wanted else ""
        if not self.paths:
            return f"There is no file in {self.folder}: put one there and press R.{download}"
        return (
            f"{name!r} is not in {' or '.join(self.roots)}. Pick another file, or put that one "
            f"into {self.folder} and press R.{download}"
        )

    def path(self, name: str) -> Path:
        """The path behind a name; CheckpointError names the folders that were looked in."""
        found = self.paths.get(name.replace("\\", "/"))
        if found is None:
            raise CheckpointError(
                f"there is no such file among the {self.kind}",
                file=name,
                hint=f"Put it into {self.folder}, press R to refresh, and pick it again.",
            )
        return found


def list_files(kind: str, roots: list[str]) -> Listing:
    """Every .safetensors, .sft and .gguf below `roots`, and every folder that is one model.

    Earlier roots win where two hold the same name. Hidden folders are skipped.
    """
    paths: dict[str, Path] = {}
    for root in roots:
        for name, path in _scan(Path(root)):
            paths.setdefault(name, path)
    return Listing(kind, tuple(roots), paths)


def new_name(name: str, suffix: str) -> str:
    """A plain file name ending in ``suffix``, which is added where there is none.

    For names that a workflow gives to a file to be written: CheckpointError for one that leads to
    another folder, is hidden, or is none on every system.
    """

    def refused(problem: str) -> CheckpointError:
        return CheckpointError(
            problem, file=repr(name), needed="a plain name such as my-model" + suffix
        )

    plain = name.strip()
    if _NOT_IN_NAMES.search(plain):
        raise refused("a file's name holds neither slashes nor any of <>:\"|?*")
    if not plain.strip(".") or plain.startswith(".") or plain.endswith("."):
        raise refused("not the name of a file")
    ending = next((e for e in EXTENSIONS if plain.casefold().endswith(e)), None)
    if ending is not None and ending != suffix:
        raise refused(f"the level is written to {suffix} files")
    plain = plain if ending is not None else plain + suffix
    if plain.partition(".")[0].casefold() in _DEVICES:
        raise refused("this name means a device on Windows")
    if len(plain.encode()) > _MAX_NAME:
        raise refused("the name is too long")
    return plain


def stamp(path: str | os.PathLike[str]) -> tuple:
    """What changes when a file changes: path, size and time; for a folder those of its files.

    A file that is not there has the path alone.
    """
    try:
        status = os.stat(path)
    except OSError:
        return (str(path),)
    if not S_ISDIR(status.st_mode):
        return (str(path), status.st_size, status.st_mtime_ns)
    return tuple(stamp(p) for p in sorted(Path(path).rglob("*")) if p.is_file())


def _scan(root: Path) -> Iterator[tuple[str, Path]]:
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back up
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        relative = here.relative_to(root)
        if here != root and _is_one_model(folders, files):
            yield relative.as_posix(), here
            folders[:] = []
            continue
        prefix = "" if here == root else relative.as_posix() + "/"
        for file in sorted(files):
            if file.casefold().endswith(EXTENSIONS) and not file.startswith("."):
                yield prefix + file, here / file


def _is_one_model(folders: list[str], files: list[str]) -> bool:
    return any(f.endswith(_INDEX_SUFFIX) for f in files) or any(c in folders for c in _COPY_FOLDERS)
