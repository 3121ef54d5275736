"""What the stages share: sizes of the real model, the device, timing that survives a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.kernels.configs import FEED_FORWARD, HIDDEN
from ...ops.tuning.timing import medians
from .worker import Context, Row, describe

ROUNDS = 5


@dataclass(frozen=True)
class Sizes:
    """Ideogram 4's, or small ones of the same shape: the CPU's, for tests."""

    hidden: int
    feed_forward: int
    tokens: tuple[int, int]  # of the two copies at 1024 px: 512 of text are the conditional's
    attention: tuple[int, int]  # at 1024 and 2048 px
    layers: int
    ceiling: int  # edge of the square products
    copied: int  # bytes

    @property
    def heads(self) -> int:
        """Of 256 values."""
        return self.hidden // 256

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the products of a block; w3 is as w1."""
        h, f = self.hidden, self.feed_forward
        return {"qkv": (3 * h, h), "o": (h, h), "w1": (f, h), "w2": (h, f)}


REAL = Sizes(HIDDEN, FEED_FORWARD, (4608, 4096), (4608, 16896), 34, 8192, 1 << 30)
REDUCED = Sizes(512, 1024, (48, 32), (48, 96), 2, 128, 1 << 20)


def sizes(context: Context) -> Sizes:
    """Which of the two; on a CPU the real ones would take hours."""
    return REDUCED if is_reduced(context) else REAL


def is_reduced(context: Context) -> bool:
    """Whether the small sizes were asked for, or nothing else can be run."""
    return context.reduced or device_of(context).type == "cpu"


def device_of(context: Context) -> torch.device:
    """The device asked for, else the first GPU, else the CPU."""
    name = context.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(device: torch.device) -> torch.dtype:
    """What activations are in there."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def short(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def random(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Standard normal, or int8 of -127..127: what zeros would take less power for."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, device=device, dtype=dtype)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def measured(
    functions: Mapping[str, Callable[[], object]],
    context: Context,
    device: torch.device,
    rounds: int = ROUNDS,
) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds, why the others have none) of each function, in turn.

    One that raises at its first run leaves the rest alone; so does one that comes after the end.
    """
    good, failed = {}, {}
    for name, function in functions.items():
        if context.late(name):
            continue
        try:
            function()
            good[name] = function
        except Exception as error:  # out of memory, no kernel for this device, a compiler's own
            failed[name] = describe(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not good:
        return {}, failed
    times = medians(good, device, rounds, context.deadline, each=True)
    return times or {}, failed


def timed_rows(
    about: Row, times: Mapping[str, float], failed: Mapping[str, str], work: float, unit: str
) -> list[Row]:
    """One row a function: ``about``, its way, milliseconds and ``work`` a second in ``unit``."""
    scale = {"tera": 1e12, "giga": 1e9}[unit.partition(" ")[0]]
    rows = [
        {**about, "way": name, "ms": 1e3 * seconds, unit: work / seconds / scale}
        for name, seconds in times.items()
    ]
    return rows + [{**about, "way": name, "failed": why} for name, why in failed.items()]


def peak_gb(device: torch.device) -> float | None:
    """Most memory that tensors took since the last call; None where nobody counts."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 3)
