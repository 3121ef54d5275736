"""Which copies a size is for: each from its file to a file of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, check_pair, open_checkpoint
from ..checkpoint.copy_names import CONDITIONAL
from .errors import QuantOptionError
from .quantize import SUFFIXES
from .recipes import QuantOptions
from .source import BaseLike, Source, files_of
from .storage import STORAGES


@dataclass(frozen=True)
class Part:
    """A file and what it is written to; ``copy``: which, where it does not say or holds both."""

    source: str | os.PathLike[str]
    out: str | os.PathLike[str]
    copy: str | None = None


@dataclass(frozen=True)
class CopyFile:
    """One copy, from where to where."""

    checkpoint: Checkpoint
    copy: str
    out: Path

    @property
    def source(self) -> Source:
        return Source(((self.checkpoint, self.copy),))


def container_of_outputs(parts: Sequence[Part], options: QuantOptions) -> str:
    """The container that the outputs' names ask for. Raises QuantOptionError, for options that a
    size does not go with too."""
    out = Path(parts[0].out)
    found = next((c for c in STORAGES if SUFFIXES[c] == out.suffix), None)
    if found is None or options.container != "native":
        raise QuantOptionError(
            "a target size is for ComfyUI's own container or GGUF",
            file=out,
            found=f"container {options.container}" if found else out.suffix,
            needed="--out with a name ending in .safetensors or .gguf",
        )
    for part in parts[1:]:
        if Path(part.out).suffix != out.suffix:
            raise QuantOptionError("all files are of one format", file=part.out, needed=out.suffix)
    if options.native and found == "gguf":
        raise QuantOptionError(
            "stock ComfyUI's own loader reads no GGUF: this container cannot hold a native choice",
            file=out,
            needed="--out with a name ending in .safetensors",
        )
    given = {
        "types of single linears": bool(options.types),
        "smoothing vectors": options.smooth is not None,
        "protection by error": (options.protect_share, options.protect_bytes, options.protect_below)
        != (None, None, None),
    }
    for name, there in given.items():
        if there:
            raise QuantOptionError(f"a target size chooses by itself, without {name}")
    return found


def open_files(
    parts: Sequence[Part], base: BaseLike | Sequence[BaseLike] | None
) -> tuple[CopyFile, ...]:
    """Each part's copy, conditional first.

    Raises QuantOptionError for a file that holds both and says not which, and for an output that is
    a source, for two of one name or of the same copy; PairMismatchError for two that are not the
    copies of one model; what ``open_checkpoint`` raises.
    """
    files = []
    for part in parts:
        checkpoint = open_checkpoint(part.source, base, copy=part.copy)
        copies = checkpoint.copies if part.copy is None else (part.copy,)
        if len(copies) > 1:
            raise QuantOptionError(
                "holds both copies, and a file that is written holds one",
                file=checkpoint.paths[0],
                hint="Say --copy both for a file each, or which one (--copy conditional).",
            )
        files.append(CopyFile(checkpoint, copies[0], Path(part.out)))
    files.sort(key=lambda file: file.copy != CONDITIONAL)
    if len(files) > 1 and files[0].checkpoint.paths != files[1].checkpoint.paths:
        check_pair(*(file.checkpoint for file in files))
    _check_apart(files)
    read = {Path(os.path.realpath(path)) for file in files for path in files_of(file.checkpoint)}
    for file in files:
        if Path(os.path.realpath(file.out)) in read:
            raise QuantOptionError("the output is the source itself", file=file.out)
    return tuple(files)


def _check_apart(files: Sequence[CopyFile]) -> None:
    """QuantOptionError for two that are one copy, or that would be written under one name."""
    if len({file.copy for file in files}) < len(files):
        raise QuantOptionError(
            f"both files are the {files[0].copy} copy",
            file=files[1].checkpoint.paths[0],
            needed="the file of the other copy",
        )
    if len({os.path.normcase(os.path.realpath(file.out)) for file in files}) < len(files):
        raise QuantOptionError(
            "both files would be written under one name",
            file=files[1].out,
            hint="Give a name of its own to the new file (--out), or to one of the sources.",
        )
