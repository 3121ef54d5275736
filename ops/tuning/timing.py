"""How long a few functions take on a device, side by side."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

LEAST = 2
"""Values of a function, beside its warm-up, below which its median says nothing."""

_TURN = 2e-3  # seconds: what takes less is run several times a turn
_MOST = 10  # runs of one function in a turn
_CPU_CACHE = 32 << 20  # bytes: the last level's share of most processors
_TRAFFIC = 256 << 20  # bytes an accelerator is kept busy with while a run is queued


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("xpu", "mps"):
        getattr(torch, device.type).synchronize()


def cache_bytes(device: torch.device) -> int:
    """How much memory ``medians`` writes between runs, so that none finds its inputs cached."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or _CPU_CACHE
    return _CPU_CACHE


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

    In turn, so that a machine whose speed drifts slows all alike. The first round warms up, and
    what it took counts nowhere: compiling is no speed. What takes less than 2 ms is run up to ten
    times a turn. Before every run the device's cache is overwritten. Device events keep the time
    where there are any. With ``prune``, what takes twice as long as the best is run LEAST times. At
    ``deadline`` (of ``time.perf_counter``) what there is counts; None if a function has fewer
    than LEAST values (or ``rounds``, if that is less) by then, unless ``each`` runs once even so,
    beside its warm-up. ``progress(done, total)`` counts turns, made or left out.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    took = dict.fromkeys(functions, _TURN)
    warm: set[str] = set()
    clock, total = _Clock(device), (rounds + 1) * len(functions)
    for turn in range(rounds + 1):
        best = min((min(values) for values in times.values() if values), default=0.0)
        for place, (name, function) in enumerate(functions.items(), 1):
            behind = prune and len(times[name]) >= LEAST and min(times[name]) > 2 * best
            runs = 0 if behind else min(max(1, int(_TURN / took[name])), _MOST)
            for _ in range(runs):
                started = time.perf_counter()
                late = deadline is not None and started >= deadline
                if late and not (each and not times[name]):
                    break
                seconds = clock.seconds(function)
                if name in warm:
                    times[name].append(seconds)
                    took[name] = time.perf_counter() - started
                warm.add(name)
            if progress is not None:
                progress(turn * len(functions) + place, total)
    least = 1 if each else min(LEAST, rounds)
    if any(len(values) < least for values in times.values()):
        return None
    return {name: statistics.median(values) for name, values in times.items()}


class _Clock:
    """Times one run at a time, each with the device's cache written over before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scratch = torch.empty(cache_bytes(device), dtype=torch.uint8, device=device)
        self._event = _event_of(device)

    def seconds(self, function: Callable[[], object]) -> float:
        """What one run takes: by the device's own events, or else by the host's clock."""
        synchronize(self._device)
        if self._event is None:
            self._scratch.zero_()
            synchronize(self._device)
            started = time.perf_counter()
            function()
            synchronize(self._device)
            return time.perf_counter() - started
        with _current(self._device):
            start, end = self._event(enable_timing=True), self._event(enable_timing=True)
            # The run is queued while the device is busy here, so that the launch is not timed.
            for _ in range(max(1, _TRAFFIC // len(self._scratch))):
                self._scratch.zero_()
            start.record()
            function()
            end.record()
            synchronize(self._device)
            return start.elapsed_time(end) / 1e3


def _event_of(device: torch.device) -> Callable[..., torch.Event] | None:
    """The class of events that keep time on ``device``; None where there is none."""
    return None if device.type == "cpu" else getattr(_module(device), "Event", None)


def _module(device: torch.device) -> object:
    return getattr(torch, device.type, None)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Events are recorded on the current device, not on that of the tensors."""
    enter = getattr(_module(device), "device", None)
    return contextlib.nullcontext() if enter is None else enter(device)
