"""Presets, sigmas, guidance, the plan of every step: pure, shared by nodes and engine."""

from .noise import NOISES, noise_seeds
from .presets import PRESETS, Preset, guidance_schedule, preset
from .schedule import (
    LAST_SIGMA,
    check_size,
    grid_size,
    is_pocket,
    sigmas,
    start_latents,
    trained_sides,
)
from .sizes import RATIOS, on_grid, size_of
from .steps import StepPlan, combine, euler_step, plan, step_at

__all__ = [
    "LAST_SIGMA",
    "NOISES",
    "PRESETS",
    "RATIOS",
    "Preset",
    "StepPlan",
    "check_size",
    "combine",
    "euler_step",
    "grid_size",
    "guidance_schedule",
    "is_pocket",
    "noise_seeds",
    "on_grid",
    "plan",
    "preset",
    "sigmas",
    "size_of",
    "start_latents",
    "step_at",
    "trained_sides",
]
