"""What a sampler did, as text for people: the picture, its time, guidance, passes, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from ..quant.tables import gigabytes
from . import one_copy
from . import residency as residency_kinds
from .costs import without_guidance
from .fused_blocks import status
from .guidance import format_guidance
from .guider import DualCopyGuider


@dataclass
class Clock:
    """Seconds since it was made, and when each step was over."""

    started: float = field(default_factory=time.perf_counter)
    steps: list[float] = field(default_factory=list)
    total: float = 0.0

    def watching(self, callback: Callable) -> Callable:
        """The host's callback of a step, with the time noted."""

        def noted(*args: object, **kwargs: object) -> object:
            self.steps.append(time.perf_counter())
            return callback(*args, **kwargs)

        return noted

    def stop(self) -> None:
        """The pictures are there."""
        self.total = time.perf_counter() - self.started

    def text(self) -> str:
        """``12.3 s``, with the seconds a step where there is more than one; the first has waited
        for the models too."""
        if len(self.steps) < 2:
            return f"{self.total:.1f} s"
        end = self.started + self.total
        each = (end - self.steps[0]) / (len(self.steps) - 1)
        return f"{self.total:.1f} s, {each:.2f} s a step after the first"


class PeakMemory:
    """The most memory that was held on a device since this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def text(self) -> str:
        """On a CUDA device what torch held at most there; elsewhere what the process did."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            return f"{gigabytes(most)} on {self.device}, weights included"
        return f"{gigabytes(_most_of_process())} of RAM, by ComfyUI since it started"


def _most_of_process() -> int:
    """Bytes that this process has had resident at most."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def report(
    guider: DualCopyGuider,
    curve: Tensor,
    seed: int,
    clock: Clock,
    memory: PeakMemory,
    size: str,
    notes: list[str],
    *,
    details: bool = False,
) -> str:
    """One fact a line, the first of them what was made and how long it took.

    size: ``1024x1024`` and what goes before the steps. notes: warnings. details: also sigmas, and
    how the blocks ran.
    """
    steps = len(curve) - 1
    lines = [f"{size}, {steps} step{'s' * (steps != 1)} in {clock.text()}", f"seed: {seed}", *notes]
    lines += _guided_lines(guider, curve, details)
    lines.append(f"peak memory: {memory.text()}")
    if details:
        lines += _fused_lines(guider)
        lines.append("sigmas: " + ", ".join(f"{value:.4g}" for value in curve.tolist()))
    return "\n".join(lines)


def _guided_lines(guider: DualCopyGuider, curve: Tensor, details: bool) -> list[str]:
    """Guidance used, passes made and left out, where the copies were."""
    passes = guider.passes.lines()
    if guider.one_branch is not None or (guider.said and guider.unconditional is None):
        return [*passes, *guider.said]
    values = [step.guidance for step in guider.guidance.plan(curve.tolist())]
    if guider.unconditional is None:
        asked = all(value == 1.0 for value in values)
        why = "guidance is 1 at every step" if asked else "no unconditional copy is connected"
        return [f"without guidance, as {why}: {without_guidance(details=details)}", *passes]
    used = [f"guidance: {format_guidance(values)}"]
    how = one_copy.stands_in(guider.unconditional)
    stands = [] if how is None else [f"unconditional: {how}"]
    return [*used, *passes, *stands, f"copies on the device: {_kept(guider)}"]


def _kept(guider: DualCopyGuider) -> str:
    if not guider.one_copy:
        return guider.kept
    return "one, for both passes" if guider.kept == residency_kinds.BOTH else guider.kept


def _fused_lines(guider: DualCopyGuider) -> list[str]:
    """How the blocks of each copy ran, where they were patched to run fused."""
    copies = {"conditional": guider.model_patcher, "unconditional": guider.unconditional}
    found = ((copy, status(patcher)) for copy, patcher in copies.items() if patcher is not None)
    return [f"fused blocks, {copy}: {text}" for copy, text in found if text is not None]
