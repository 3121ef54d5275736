"""One step: what runs, how the two predictions combine, where the latents go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import OpError

Unconditional = Literal["run", "reuse", "skip"]


@dataclass(frozen=True)
class StepPlan:
    """One Euler step from ``sigma`` to ``sigma_next``.

    ``unconditional`` says what becomes of the unconditional copy: it runs, its last prediction is
    used again, or it is not needed because ``guidance`` is 1.
    """

    index: int
    sigma: float
    sigma_next: float
    guidance: float
    unconditional: Unconditional

    @property
    def time(self) -> float:
        """The model's time: 0 noise, 1 clean."""
        return 1.0 - self.sigma


def plan(
    sigmas: Tensor | Sequence[float],
    guidance: Sequence[float],
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    reuse: int = 1,
) -> tuple[StepPlan, ...]:
    """The steps along ``sigmas`` [steps + 1] with ``guidance`` [steps], in sampling order.

    Two savings, both off by default, both changes of the picture. ``interval``: guidance acts only
    on steps i with start <= i / steps < end, elsewhere it is 1 and the unconditional copy is
    skipped (guidance in a limited interval, arXiv 2404.07724, in steps instead of sigmas, so that
    it means the same at every resolution). ``reuse`` = n: an unconditional prediction serves up to
    n steps in a row.
    """
    values = [float(s) for s in sigmas]
    count = len(values) - 1
    if count < 1 or len(guidance) != count:
        raise OpError("sigmas and guidance do not fit", found=len(guidance), needed=max(count, 1))
    start, end = interval
    if not 0.0 <= start <= end <= 1.0:
        raise OpError(
            "guidance interval out of range", found=interval, needed="0 <= start <= end <= 1"
        )
    if reuse < 1:
        raise OpError("reuse out of range", found=reuse, needed="at least 1")
    steps = []
    last_run = None
    for i, factor in enumerate(guidance):
        factor = float(factor) if start <= i / count < end else 1.0
        if factor == 1.0:
            unconditional: Unconditional = "skip"
        elif last_run is not None and i - last_run < reuse:
            unconditional = "reuse"
        else:
            unconditional, last_run = "run", i
        steps.append(StepPlan(i, values[i], values[i + 1], factor, unconditional))
    return tuple(steps)


def step_at(steps: Sequence[StepPlan], sigma: float) -> StepPlan:
    """The step whose sigma lies nearest: for callers that see a sigma and no step number."""
    return min(steps, key=lambda step: abs(step.sigma - sigma))


def combine(v_cond: Tensor, v_uncond: Tensor, g: float | Tensor) -> Tensor:
    """g * v_cond + (1 - g) * v_uncond in fp32, whatever the inputs' dtype."""
    # g as an fp32 tensor, so that 1 - g is rounded where the reference rounds it.
    weight = torch.as_tensor(g, dtype=torch.float32)
    return weight * v_cond.float() + (1.0 - weight) * v_uncond.float()


def euler_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma - sigma_next) * v in fp32; v points from noise to clean."""
    return x.float() + (sigma - sigma_next) * v.float()
