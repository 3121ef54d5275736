"""How much main memory (RAM) a level takes: what the loaders do, added up.

Weights are read into memory of the process, one tensor at a time, and stay as they are stored: a
load takes what it keeps, and one large tensor more on the way (``tests/test_host_main_memory.py``
measures every kind of level in the real host). What quantizing leaves out, and the encoder's
embedding, is held as floats. Both copies and the encoder are loaded before the first step. What
leaves for the device while a picture is made is the host's matter: that part is modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...checkpoint.entries import Entry
from ...checkpoint.pairs import ALTERNATING, BOTH

SYSTEM = 4_000_000_000
"""Assumed: the system, ComfyUI with torch and a device's driver, the VAE, one large tensor."""

SHARED = ("cpu", "mps")
"""Devices that compute in main memory: nothing leaves it."""


@dataclass(frozen=True)
class MainMemory:
    """Bytes of main memory in all: before the first step, and while a picture is made (modelled).

    ``running`` is that of a host which gives back what it moved to the device. One that keeps it
    (ComfyUI's dynamic memory) stays at ``loaded``, and pins copies beside it where there is room.
    """

    loaded: int
    running: int


def main_memory(
    copies: tuple[int, int], encoder: int, residency: str | None, device: str
) -> MainMemory:
    """Of two copies and an encoder, in bytes; residency: as in ``levels``, None where unknown."""
    moved = {BOTH: sum(copies), ALTERNATING: min(copies)}.get(residency, 0)
    loaded = sum(copies) + encoder + SYSTEM
    return MainMemory(loaded, loaded if device in SHARED else loaded - moved)


def bytes_in_memory(entries: Iterable[Entry], itemsize: int) -> int:
    """Bytes that a loader keeps of these; ``itemsize``: of the dtype that floats are held in."""
    return sum(
        entry.nbytes
        if entry.linear and entry.level != "BF16"
        else math.prod(entry.shape) * itemsize
        for entry in entries
    )
