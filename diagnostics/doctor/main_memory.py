"""How much main memory (RAM) a level takes: what the loaders do, added up.

Model and encoder files are mapped: their weights lie in the system's file cache, which gives way
when memory is short and is filled again from the disk. So a load holds what is not used as it is
stored (floats in another dtype, rows that a file stores apart) and little more
(``tests/test_host_main_memory.py`` measures every kind of level in the real host). What is read
again and again, in each step or for each picture, has to stay in the cache for full speed: that
part is modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...checkpoint.entries import Entry
from ...checkpoint.pairs import BOTH

SYSTEM = 4_000_000_000
"""Assumed: the system, ComfyUI with torch and a device's driver, the VAE, one large tensor."""

SHARED = ("cpu", "mps")
"""Devices that compute in main memory: nothing leaves it."""


@dataclass(frozen=True)
class MainMemory:
    """Bytes of main memory in all: without which nothing runs, and with which nothing is read from
    the disk twice (modelled).

    ComfyUI's dynamic memory pins copies of moved weights where there is room beside this.
    """

    needed: int
    at_speed: int


def main_memory(
    copies: tuple[int, int], encoder: int, residency: str | None, device: str, held: int = 0
) -> MainMemory:
    """Of two copies and an encoder, in bytes; residency: as in ``levels``, None where unknown.

    held: the part of these that is not mapped.
    """
    stays = residency == BOTH and device not in SHARED
    again = encoder + (0 if stays else sum(copies))
    needed = SYSTEM + held
    return MainMemory(needed, max(needed, SYSTEM + again))


def bytes_in_memory(entries: Iterable[Entry], itemsize: int) -> int:
    """Bytes of these as they are used; ``itemsize``: of the dtype that floats are used in."""
    return sum(_size(entry, itemsize) for entry in entries)


def bytes_held(entries: Iterable[Entry], itemsize: int) -> int:
    """The part of `bytes_in_memory` that a mapped file does not hold as it is used."""
    return sum(_size(entry, itemsize) for entry in entries if not _mapped(entry, itemsize))


def _size(entry: Entry, itemsize: int) -> int:
    return entry.nbytes if _quantized(entry) else math.prod(entry.shape) * itemsize


def _quantized(entry: Entry) -> bool:
    return entry.linear and entry.level != "BF16"


def _mapped(entry: Entry, itemsize: int) -> bool:
    if len(entry.pieces) > 1 or entry.stored_folding is not None:
        return False
    used_as = {2: "BF16", 4: "F32"}[itemsize]
    return _quantized(entry) or entry.pieces[0].weight.dtype == used_as
