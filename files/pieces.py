"""Reading a file a piece at a time: what is hashed or checked is larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

PIECE = 1 << 24
"""Bytes: enough that a disk reads without pause, and nothing beside a model."""


def pieces(file: BinaryIO, nbytes: int | None = None) -> Iterator[bytes]:
    """The next ``nbytes`` of ``file`` (None: all that is left), at most ``PIECE`` at a time.

    Ends early where the file does.
    """
    while nbytes is None or nbytes > 0:
        piece = file.read(PIECE if nbytes is None else min(nbytes, PIECE))
        if not piece:
            return
        yield piece
        if nbytes is not None:
            nbytes -= len(piece)
