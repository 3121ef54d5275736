"""How long a call takes, in seconds of one machine, so that limits hold on slower and busy ones.

A limit is there to find a cost that grows with the square of what a file holds: such a call takes
ten times as long or a hundred times, on any machine. A slow neighbour or an old CPU takes twice.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable

# CPU seconds of _reference on the machine that the limits were set on (a Xeon with AMX)
_REFERENCE_SECONDS = 0.010
_HEADER = json.dumps(
    {f"layers.{i}.weight": {"dtype": "U8", "shape": [i, 16]} for i in range(10_000)}
)


def cpu_seconds(function: Callable[[], object], limit: float = 0.0, tries: int = 5) -> float:
    """The least CPU time of up to `tries` calls, in seconds of the machine of the limits.

    Of this thread alone: other processes, and threads that wait for work, do not count. A machine
    that takes longer for the same known work, both before and after the call, has longer seconds;
    a faster one has none shorter. The first call under `limit` is the last.
    """
    least = float("inf")
    for _ in range(tries):
        before = _reference_seconds()
        seconds = _thread_seconds(function)
        slowness = min(before, _reference_seconds()) / _REFERENCE_SECONDS
        least = min(least, seconds / max(1.0, slowness))
        if least < limit:
            break
    return least


def _thread_seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def _reference_seconds() -> float:
    """Without the garbage of others, whose collection may take longer than the work."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return _thread_seconds(_reference)
    finally:
        if collects:
            gc.enable()


def _reference() -> int:
    """What readers of headers do: JSON, names in parts, dicts."""
    entries = json.loads(_HEADER)
    parts: dict[str, int] = {}
    for name, entry in entries.items():
        for part in name.removesuffix(".weight").split("."):
            parts[part] = parts.get(part, 0) + entry["shape"][0]
        name.replace("layers.", "blocks.").rpartition(".")
    return len(parts)
