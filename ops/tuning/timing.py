"""How long a few functions take on a device, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("xpu", "mps"):
        getattr(torch, device.type).synchronize()


def medians(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 5,
    deadline: float | None = None,
    *,
    prune: bool = False,
    each: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float] | None:
    """Median seconds of each function; the rounds go through all of them in turn.

    In turn, so that a machine whose speed drifts slows all alike. The first round warms up. With
    ``prune``, what takes twice as long as the best is not run a third time. At ``deadline`` (of
    ``time.perf_counter``) what there is counts; None if a function was not reached, unless ``each``
    runs once even so. ``progress(done, total)`` counts runs, made or left out.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    total = (rounds + 1) * len(functions)
    for turn in range(rounds + 1):
        best = min((min(values) for values in times.values() if values), default=0.0)
        for place, (name, function) in enumerate(functions.items(), 1):
            late = deadline is not None and time.perf_counter() >= deadline
            behind = prune and len(times[name]) >= 2 and min(times[name]) > 2 * best
            if not (late or behind) or (each and not times[name]):
                times[name].append(_seconds(function, device))
            if progress is not None:
                progress(turn * len(functions) + place, total)
    if not all(times.values()):
        return None
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started
