"""Which guidance every step gets: from a preset's name, a number, or a list as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpError
from ..sampling import LAST_SIGMA, StepPlan, guidance_schedule, plan, preset

_END = 1.01 * LAST_SIGMA  # no schedule comes as near to 0 before its end
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
_ENTRY = re.compile(r"(?P<value>\d+(?:\.\d*)?|\.\d+)(?:\s*[*x]\s*(?P<count>\d+))?")


def parse_guidance(text: str) -> tuple[float, ...]:
    """``"7*18, 3*2"`` -> eighteen 7s and two 3s, in sampling order; ``"7"`` -> one 7.

    OpError says what could not be read.
    """
    values: list[float] = []
    for entry in re.split(r"[,;\n]", text):
        if not entry.strip():
            continue
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise OpError(
                "cannot read the guidance", found=repr(entry.strip()), needed="such as 7*18, 3*2"
            )
        value, count = float(match["value"]), int(match["count"] or 1)
        if value > MAX_GUIDANCE:
            raise OpError("guidance is too large", found=value, needed=f"at most {MAX_GUIDANCE:g}")
        if not 1 <= count <= MAX_STEPS - len(values):
            raise OpError(
                "wrong number of steps", found=repr(entry.strip()), needed=f"1 to {MAX_STEPS} steps"
            )
        values += [value] * count
    if not values:
        raise OpError("the guidance is empty", found=repr(text), needed="such as 7, or 7*18, 3*2")
    return tuple(values)


def format_guidance(values: Sequence[float]) -> str:
    """The shortest text that `parse_guidance` reads back: ``7*18, 3*2``."""
    runs: list[list] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ", ".join(f"{value:g}" if count == 1 else f"{value:g}*{count}" for value, count in runs)


@dataclass(frozen=True)
class Guidance:
    """How strong guidance is at every step, independent of how many steps there will be.

    preset: 7s and then the preset's few 3s at the end. values: one number for every step, or one
    a step. interval and reuse: see `sampling.plan`; both change the picture and are off here.
    """

    preset: str | None = "default"
    values: tuple[float, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    reuse: int = 1

    def plan(self, sigmas: Sequence[float]) -> tuple[StepPlan, ...]:
        """The steps along `sigmas` (host's order, steps + 1 values)."""
        sigmas = [float(s) for s in sigmas]
        factors = self._factors(len(sigmas) - 1, to_the_end=sigmas[-1] <= _END)
        return plan(sigmas, factors, interval=self.interval, reuse=self.reuse)

    def _factors(self, steps: int, to_the_end: bool) -> tuple[float, ...]:
        """One factor a step. A run that stops before sigma 0 is the first part of a longer one."""
        if self.preset is not None:
            if to_the_end or not preset(self.preset).guided:
                return guidance_schedule(self.preset, steps)
            return guidance_schedule(self.preset, steps + preset(self.preset).polish)[:steps]
        if len(self.values) == 1:
            return self.values * steps
        if len(self.values) < steps:
            raise OpError(
                "the guidance has fewer entries than the sampler has steps",
                found=f"{len(self.values)} entries for {steps} steps",
                needed=f"{steps} entries, or one for all",
                hint="Take sigmas and guidance from the same preset node.",
            )
        # image to image starts part of the way down: the last entries belong to the last steps
        return self.values[-steps:] if to_the_end else self.values[:steps]
