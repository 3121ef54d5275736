"""Files that nodes have written: whether what a node would do is done still."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.listing import stamp

# node id -> (the file that it wrote last, its stamp), and how often that one was found changed
_made: dict[str, tuple[Path, tuple]] = {}
_lost: dict[str, int] = {}


def remember_file(node_id: str, path: Path) -> None:
    """``node_id`` has written ``path`` just now."""
    _made[node_id] = (path, stamp(path))


def times_lost(node_id: str) -> int:
    """How often the file of ``node_id`` was gone or another one when this was asked.

    A part of the node's fingerprint: the same graph queued again finds its file and does nothing,
    and writes it again where it was deleted.
    """
    known = _made.get(node_id)
    if known is not None and stamp(known[0]) != known[1]:
        del _made[node_id]
        _lost[node_id] = _lost.get(node_id, 0) + 1
    return _lost.get(node_id, 0)
