"""Presets, sigmas, guidance, the plan of every step: pure, shared by nodes and engine."""

from .noise import NOISES, noise_seeds
from .presets import PRESETS, Preset, guidance_schedule, preset
from .schedule import LAST_SIGMA, check_size, grid_size, sigmas, start_latents
from .steps import StepPlan, combine, euler_step, plan, step_at

__all__ = [
    "LAST_SIGMA",
    "NOISES",
    "PRESETS",
    "Preset",
    "StepPlan",
    "check_size",
    "combine",
    "euler_step",
    "grid_size",
    "guidance_schedule",
    "noise_seeds",
    "plan",
    "preset",
    "sigmas",
    "start_latents",
    "step_at",
]
