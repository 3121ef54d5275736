"""Headers of model files, read once for each state of the file on disk."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from .model_files import stamp


def open_header(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    copy: str | None = None,
) -> Checkpoint:
    """`checkpoint.open_checkpoint`, cached by path, size and time of every file involved.

    copy: the user's word for which copy a single-copy file holds, where the file itself is silent.
    Raises what `open_checkpoint` raises; errors are not cached.
    """
    path = Path(path)
    base = None if base is None else Path(base)
    return _open(path, base, copy, stamp(path), None if base is None else stamp(base))


@lru_cache(maxsize=256)
def _open(path: Path, base: Path | None, copy: str | None, _: tuple, __: tuple | None):
    return open_checkpoint(path, base, copy=copy)
