"""Headers of model files, read once for each state of the file on disk."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.listing import stamp
from ..errors import NotIdeogram4Error


def open_header(
    path: str | os.PathLike[str],
    bases: tuple[Path, ...] = (),
    *,
    copy: str | None = None,
    one_branch: bool | None = None,
) -> Checkpoint:
    """`checkpoint.open_checkpoint`, cached by path, size and time of every file involved.

    bases: files that give what this one lacks. copy, one_branch: the user's word for
    which copy it holds, and for whether it needs no guidance.
    Raises what `open_checkpoint` raises. Of the errors only "this is another model" is remembered,
    which a download that goes on cannot change without changing the file.
    """
    path = Path(path)
    state = stamp(path)
    known = _others.get(path)
    if known is not None and known[0] == state:
        raise known[1].with_traceback(None)
    try:
        return _open(path, bases, copy, one_branch, (state, *map(stamp, bases)))
    except NotIdeogram4Error as error:
        if not bases:  # else the base may be the one that is another model
            _others[path] = (state, error.with_traceback(None))
        raise


# path -> (state of the file, what it was refused with); one entry for each file of the host's
_others: dict[Path, tuple[tuple, NotIdeogram4Error]] = {}


@lru_cache(maxsize=256)
def _open(
    path: Path, bases: tuple[Path, ...], copy: str | None, one_branch: bool | None, _: tuple
) -> Checkpoint:
    return open_checkpoint(path, bases or None, copy=copy, one_branch=one_branch)
