"""Work on a tensor a chunk at a time: how much at once, in which threads, into which memory.

Every size of a chunk is a name here, in values (weights or activations) where nothing else is said:
what a loop holds beside its input and its result is a few times that many fp32 numbers. Pieces of
files, in bytes, are in ``files/pieces.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import torch
from torch import Tensor

CACHED = 1 << 20
"""On a CPU: 4 MiB in fp32, near the size of a core's cache, so that temporaries stay in it."""

ENCODED = 1 << 20
"""On a CPU, of a search in threads: beyond the cache, as small chunks wait for Python's lock."""

FED_BACK = 1 << 22
"""On a CPU, of rounding with feedback: it works by columns, and a call should pay for many rows."""

MULTIPLIED = 1 << 22
"""On a CPU, weights decoded for one product: 16 MiB in fp32, beside which a call costs little."""

TILED = 1 << 17
"""On a CPU, activations on their way to int8 and back: their three fp32 copies stay in a cache."""

ON_ACCELERATOR = 1 << 24
"""Off the CPU, of weights: launches cost more than memory there, 64 MiB in fp32."""

TILED_ON_ACCELERATOR = 1 << 22
"""Off the CPU, of activations: three fp32 copies of them lie beside the output in every linear."""

HUGE_PAGES_FROM = 1 << 22
"""Bytes: numpy asks for huge pages from here on."""


def row_chunks(
    shape: tuple[int, ...], device: torch.device | None = None, values: int = CACHED
) -> Iterator[slice]:
    """Slices of the first dimension that together cover ``shape``, ``values`` values each or a row.

    Off the CPU ``ON_ACCELERATOR`` each; None is a CPU. Nothing for a scalar or no rows.
    """
    rows = shape[0] if shape else 0
    step = max(1, chunk_size(device, values) // max(prod(shape[1:]), 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def chunk_size(device: torch.device | None, on_cpu: int) -> int:
    """Weights at a time on ``device``; None is a CPU."""
    return on_cpu if device is None or device.type == "cpu" else ON_ACCELERATOR


def tile_values(device: torch.device) -> int:
    """How many values ``device`` takes at a time through fp32 copies, of which there are three."""
    return TILED if device.type == "cpu" else TILED_ON_ACCELERATOR


def for_each(
    starts: range,
    work: Callable[[int], None],
    device: torch.device | None,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Call ``work`` for every start, on a CPU in as many threads as PyTorch may use.

    ``done(count)``, in the calling thread, after each of the first ``count`` of them.

    A search is some hundred small operations; whole chunks in parallel spare a barrier after each
    of them, which costs more than the operation where other programs use the cores too. Chunks are
    large, beyond a core's cache, as the workers take turns at Python's lock: on smaller ones they
    wait for it longer than they compute. Every worker computes alone. ``torch.set_num_threads``
    sets the calling thread and the default of threads to come, so that the caller restores the
    default.
    """
    work = torch.inference_mode()(work)  # its calls are cheaper
    threads = min(workers(device), len(starts))
    if threads <= 1:
        for count, start in enumerate(starts, 1):
            work(start)
            done(count)
        return
    default = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for count, _ in enumerate(pool.map(work, starts), 1):
                done(count)  # map raises what a worker raised, and starts no more then
    finally:
        torch.set_num_threads(default)


def workers(device: torch.device | None) -> int:
    """Threads that share the work of ``for_each``; None is a CPU."""
    return torch.get_num_threads() if device is None or device.type == "cpu" else 1


def even(total: int, some: int, parts: int = 1) -> int:
    """How much at a time, about ``some``, gives each of ``parts`` as much to do.

    Less than an eighth of ``some`` is not worth a thread.
    """
    some = max(1, some)
    turns = max(1, round(total / (some * parts)))
    return max(1, some // 8, -(-total // (turns * parts)))


def uninitialised(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, in huge pages where a large CPU tensor can have them.

    numpy advises the kernel to back large buffers by huge pages and PyTorch does not; page faults
    on fresh memory then take two thirds of the decoding time.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGES_FROM or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = np.empty(nbytes + 64, dtype=np.uint8)
    start = -buffer.ctypes.data % 64  # PyTorch's own alignment
    return torch.from_numpy(buffer[start : start + nbytes]).view(dtype).view(shape)
