"""Work on a tensor a chunk at a time: how much at once, in which threads, into which memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import torch
from torch import Tensor

ACCELERATOR_CHUNK = 1 << 24  # weights: launches cost more than memory there
HUGE_PAGES_FROM = 1 << 22  # bytes: numpy asks for huge pages from here on


def for_each(starts: range, work: Callable[[int], None], device: torch.device) -> None:
    """Call ``work`` for every start, on a CPU in as many threads as PyTorch may use.

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
        for start in starts:
            work(start)
        return
    default = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, starts):
                pass  # raises what a worker raised
    finally:
        torch.set_num_threads(default)


def workers(device: torch.device) -> int:
    """Threads that share the work of ``for_each``."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def even(total: int, some: int, parts: int = 1) -> int:
    """How much at a time, about ``some``, gives each of ``parts`` as much to do.

    Less than an eighth of ``some`` is not worth a thread.
    """
    some = max(1, some)
    turns = max(1, round(total / (some * parts)))
    return max(1, some // 8, -(-total // (turns * parts)))


def chunk_size(device: torch.device, on_cpu: int) -> int:
    """Weights at a time on ``device``."""
    return on_cpu if device.type == "cpu" else ACCELERATOR_CHUNK


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
