"""Files that nodes have written: whether what a node would do is done still."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.listing import stamp

# node id -> the files that it wrote last, with their stamps, and how often one was found changed
_made: dict[str, dict[Path, tuple]] = {}
_lost: dict[str, int] = {}


def remember_files(node_id: str, paths: Iterable[Path]) -> None:
    """``node_id`` has written ``paths`` just now."""
    _made[node_id] = {path: stamp(path) for path in paths}


def times_lost(node_id: str) -> int:
    """How often a file of ``node_id`` was gone or another one when this was asked.

    A part of the node's fingerprint: the same graph queued again finds its files and does nothing,
    and writes them again where one was deleted.
    """
    known = _made.get(node_id, {})
    if any(stamp(path) != state for path, state in known.items()):
        del _made[node_id]
        _lost[node_id] = _lost.get(node_id, 0) + 1
    return _lost.get(node_id, 0)
