"""The memory that a kernel touches, by sectors: counted under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

SECTOR = 32
"""Bytes that a GPU moves between its memory and its caches at once."""


class Traffic:
    """Sectors that were loaded or stored, each counted once for every program that touches it.

    So a program's own second look is taken to find them in its cache, another's is not.
    """

    def __init__(self) -> None:
        self.touched: set[tuple] = set()

    @property
    def nbytes(self) -> int:
        return SECTOR * len(self.touched)

    def note(self, kind: str, program: tuple[int, ...], pointers, mask, size: int) -> None:
        at = pointers.data[mask.data.astype(bool)].astype(np.int64)
        for end in (at, at + size - 1):
            self.touched |= {(kind, program, sector) for sector in np.unique(end // SECTOR)}


@contextmanager
def sectors() -> Iterator[Traffic]:
    """Counts what kernels move meanwhile; see ``Traffic``."""
    from triton.runtime import interpreter

    builder, traffic = interpreter.interpreter_builder, Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store
    size = lambda pointers: max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)

    def loading(pointers, mask, *rest):
        traffic.note("load", tuple(builder.grid_idx), pointers, mask, size(pointers))
        return load(pointers, mask, *rest)

    def storing(pointers, value, mask, *rest):
        traffic.note("store", tuple(builder.grid_idx), pointers, mask, size(pointers))
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = loading, storing
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store
