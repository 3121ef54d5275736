"""The reference's three presets and those of one-branch models: steps, sigmas, guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpError

MAIN_GUIDANCE = 7.0
POLISH_GUIDANCE = 3.0


@dataclass(frozen=True)
class Preset:
    """A step count, the logit-normal's mu and std, and how many last steps polish.

    ``guided`` False: for models that hold their guidance in themselves, 1 at every step.
    ``needs``: the model or LoRA that a preset without guidance is made for.
    """

    name: str
    steps: int
    polish: int
    mu: float
    std: float
    guided: bool = True
    title: str = ""
    needs: str = ""

    @property
    def guidance(self) -> tuple[float, ...]:
        """One factor a step, in sampling order: 7 for the main steps, 3 for the polish steps."""
        return self.factors(self.steps)

    def factors(self, steps: int) -> tuple[float, ...]:
        """The same for another number of steps, which keeps the number of polish steps."""
        return _main_then_polish(steps, self.polish) if self.guided else (1.0,) * steps


def _one_branch(name: str, steps: int, title: str, needs: str) -> Preset:
    return Preset(name, steps, 0, mu=0.0, std=1.75, guided=False, title=title, needs=needs)


_DISTILLED = "a one-branch model such as fal's Instant or Fast"

PRESETS: dict[str, Preset] = {
    "quality": Preset("quality", steps=48, polish=3, mu=0.0, std=1.5),
    "default": Preset("default", steps=20, polish=2, mu=0.0, std=1.75),
    "turbo": Preset("turbo", steps=12, polish=1, mu=0.5, std=1.75),
    # fal's two distillations, and a LoRA on the conditional copy; mu: see docs/levels.md
    "instant": _one_branch("instant", 8, "Instant 8", _DISTILLED),
    "fast": _one_branch("fast", 20, "Fast 20", _DISTILLED),
    "turbotime": _one_branch("turbotime", 4, "TurboTime 4 (with its LoRA)", "the TurboTime LoRA"),
}


def _main_then_polish(steps: int, polish: int) -> tuple[float, ...]:
    # The first step, which decides the composition, is never a polish step.
    polish = min(polish, steps - 1)
    return (MAIN_GUIDANCE,) * (steps - polish) + (POLISH_GUIDANCE,) * polish


def preset(name: str | Preset) -> Preset:
    """The preset of that name, or of that title; OpError names those there are."""
    if isinstance(name, Preset):
        return name
    titled = {p.title.casefold(): p for p in PRESETS.values() if p.title}
    found = PRESETS.get(name) or titled.get(str(name).casefold())
    if found is None:
        raise OpError("no such preset", found=repr(name), needed=", ".join(PRESETS))
    return found


def guidance_schedule(
    preset_name: str | Preset = "default",
    steps: int | None = None,
    guidance: float | Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The guidance factor of every step, in sampling order (largest sigma first).

    Without ``guidance``: the preset's 7s and 3s, or 1s where it is for one branch. Another step
    count keeps the preset's *number* of polish steps, because these follow the count in the
    reference, not a sigma. With a number: that number at every step. With a sequence: the sequence,
    whose length must be the step count.
    """
    chosen = preset(preset_name)
    count = chosen.steps if steps is None else steps
    if count < 1:
        raise OpError("too few steps", found=count, needed="at least 1")
    if guidance is None:
        return chosen.factors(count)
    if isinstance(guidance, (int, float)):
        return (float(guidance),) * count
    if len(guidance) != count:
        raise OpError("wrong number of guidance factors", found=len(guidance), needed=count)
    return tuple(float(g) for g in guidance)
