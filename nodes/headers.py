"""Headers of model files, read once for each state of the file on disk."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.listing import stamp


def open_header(
    path: str | os.PathLike[str],
    bases: tuple[Path, ...] = (),
    *,
    copy: str | None = None,
) -> Checkpoint:
    """`checkpoint.open_checkpoint`, cached by path, size and time of every file involved.

    bases: files that give what this one lacks. copy: the user's word for which copy it holds.
    Raises what `open_checkpoint` raises; errors are not cached.
    """
    path = Path(path)
    return _open(path, bases, copy, (stamp(path), *map(stamp, bases)))


@lru_cache(maxsize=256)
def _open(path: Path, bases: tuple[Path, ...], copy: str | None, _: tuple) -> Checkpoint:
    return open_checkpoint(path, bases or None, copy=copy)
