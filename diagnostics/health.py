"""What a device is and whether it is fit to be timed: clock, heat, load, free memory, steadiness.

From torch alone; clock, temperature, power and load of an NVIDIA card come through torch from the
package nvidia-ml-py, where that is installed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from ..ops.tuning.choice_files import environment
from ..ops.tuning.timing import synchronize

_STEADY_SECONDS = 1.0
_STEADY_SIZE = {"cpu": 512}
_STEADY_SIZE_DEVICE = 4096
# Work of equal size may differ by this between the first and the last part of a run, and this part
# of a CPU's time may go elsewhere.
_DRIFT = 0.10
_TAKEN = 0.10


def examine(device: torch.device) -> dict:
    """``{"about": ..., "state": ..., "warnings": [...]}``; works the device for a second or two.

    The state has readings ``before`` and ``after`` that work, its ``drift`` and, on a CPU, the
    ``taken`` part of its threads' time that other processes had.
    """
    before = _readings(device)
    started = time.perf_counter(), time.process_time()
    rates = _rates(device)
    wall, used = time.perf_counter() - started[0], time.process_time() - started[1]
    state = {"before": before, "after": _readings(device), "drift": _drift(rates)}
    if device.type == "cpu" and sys.platform != "darwin":  # there products run on threads not ours
        state["taken"] = max(0.0, 1 - used / (wall * torch.get_num_threads()))
    return {"about": environment(device), "state": state, "warnings": _warnings(device, state)}


def _readings(device: torch.device) -> dict[str, float]:
    if device.type == "cpu":
        load = getattr(os, "getloadavg", lambda: (None,))()[0]
        return {} if load is None else {"load average": load}
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    readings = {"memory free, GB": free / 1e9, "memory, GB": total / 1e9}
    questions: dict[str, Callable[[torch.device], float]] = {
        "clock, MHz": torch.cuda.clock_rate,
        "temperature, C": torch.cuda.temperature,
        "power, W": lambda d: torch.cuda.power_draw(d) / 1e3,
        "load, %": torch.cuda.utilization,
    }
    for name, ask in questions.items():
        try:
            readings[name] = float(ask(device))
        except Exception:  # no nvidia-ml-py, or a card or driver that does not tell
            continue
    return readings


def _rates(device: torch.device) -> list[float]:
    """Products a second in the parts of a run."""
    size = _STEADY_SIZE.get(device.type, _STEADY_SIZE_DEVICE)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a
    rates, end = [], time.perf_counter() + _STEADY_SECONDS
    while time.perf_counter() < end or len(rates) < 8:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        synchronize(device)
        rates.append(4 / (time.perf_counter() - started))
    return rates


def _drift(rates: list[float]) -> float:
    """By how much the last quarter is slower (below 0) or faster than the first, as a fraction."""
    quarter = max(1, len(rates) // 4)
    first, last = sorted(rates[:quarter]), sorted(rates[-quarter:])
    return last[len(last) // 2] / first[len(first) // 2] - 1


def _warnings(device: torch.device, state: dict) -> list[str]:
    found = []
    before, drift, taken = state["before"], state["drift"], state.get("taken", 0.0)
    if abs(drift) > _DRIFT:
        why = "other load, or a clock that throttles" if drift < 0 else "other load that ended"
        found.append(f"speed changed by {drift:+.0%} within a second: {why}")
    if taken > _TAKEN:
        found.append(
            f"other processes take {taken:.0%} of the time of {torch.get_num_threads()} threads: "
            "times are too long"
        )
    if before.get("load, %", 0) > 10:
        found.append(f"something else uses {before['load, %']:.0f} % of the card")
    total = before.get("memory, GB", 0)
    if total and before["memory free, GB"] < total / 2:
        found.append(f"only {before['memory free, GB']:.1f} of {total:.1f} GB of memory are free")
    if device.type == "cuda" and "clock, MHz" not in before:
        found.append("clock, temperature and load are unknown: pip install nvidia-ml-py")
    if before.get("temperature, C", 0) > 83:
        found.append(
            f"the card is at {before['temperature, C']:.0f} C before the first measurement"
        )
    return found
