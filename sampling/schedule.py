"""Sizes, sigmas and the start of sampling (sigma 1 is noise, 0 clean; model time is 1 - sigma)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import OpError

LOGSNR_MIN, LOGSNR_MAX = -15.0, 18.0
REFERENCE_PIXELS = 512 * 512
LAST_SIGMA = 1.0 / (1.0 + math.exp(-0.5 * LOGSNR_MIN))
"""5.53e-4, where the clamp of the logSNR ends the schedule: what one tool keeps instead of 0."""

TOKEN_PIXELS = 16  # one token is 16 x 16 px: the VAE's factor 8, then 2 x 2 patches
TRAINED_SIDES = (256, 2048)
_POCKET_SIDES = (64, 128)
_POCKET_FEATURES = 13 * 64  # of a token: the test model's that comes with the pack
TRAINED_ASPECT = 6.0


def is_pocket(features: int) -> bool:
    """Whether so many features a token of text are the test model's."""
    return features == _POCKET_FEATURES


def trained_sides(features: int) -> tuple[int, int]:
    """(smallest, largest) side in px of the model that reads so many features a token of text."""
    return _POCKET_SIDES if is_pocket(features) else TRAINED_SIDES


def check_size(width: int, height: int, sides: tuple[int, int] = TRAINED_SIDES) -> list[str]:
    """What to warn about; OpError where a side is no positive multiple of 16.

    The model was trained on ``sides``, 256 to 2048 px, and aspects up to 6:1; beyond that it runs.
    """
    for side, value in (("width", width), ("height", height)):
        if value < TOKEN_PIXELS or value % TOKEN_PIXELS:
            down = max(value // TOKEN_PIXELS, 1) * TOKEN_PIXELS
            raise OpError(
                f"{side} is no multiple of {TOKEN_PIXELS}",
                found=value,
                needed=f"{down} or {down + TOKEN_PIXELS}",
            )
    warnings = []
    smallest, largest = sides
    if not (smallest <= min(width, height) and max(width, height) <= largest):
        warnings.append(f"{width}x{height} is outside the trained sides, {smallest} to {largest}")
    if max(width, height) > TRAINED_ASPECT * min(width, height):
        warnings.append(f"{width}x{height} is beyond the trained aspect, {TRAINED_ASPECT:g}:1")
    return warnings


def grid_size(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of image tokens."""
    check_size(width, height)
    return height // TOKEN_PIXELS, width // TOKEN_PIXELS


def sigmas(
    steps: int,
    width: int,
    height: int,
    mu: float,
    std: float,
    denoise: float = 1.0,
    last: float = 0.0,
) -> Tensor:
    """sigma_i = sigmoid(mu + ln(W*H / 512^2) / 2 + std * ndtri(1 - i / steps)), then ``last``.

    Returns ``steps + 1`` descending values, float32 (float64 inside), logSNR clamped to [-15, 18]
    as in the reference; bit-equal to diffusers' and ComfyUI's function. ``denoise`` < 1 starts
    part of the way down: the last ``steps + 1`` values of a schedule of ``steps / denoise`` steps,
    the host's meaning of the word. ``last``: 0 as in the reference, or `LAST_SIGMA` at most.
    """
    if steps < 1:
        raise OpError("too few steps", found=steps, needed="at least 1")
    if not 0.0 < denoise <= 1.0:
        raise OpError("denoise out of range", found=denoise, needed="above 0, at most 1")
    if std <= 0.0:
        raise OpError("std out of range", found=std, needed="above 0")
    if not 0.0 <= last <= LAST_SIGMA:
        raise OpError("last sigma out of range", found=last, needed=f"0 to {LAST_SIGMA:.3g}")
    check_size(width, height)
    total = int(steps / denoise)
    mean = mu + 0.5 * math.log(width * height / REFERENCE_PIXELS)
    quantiles = torch.linspace(0.0, 1.0, total + 1, dtype=torch.float64)
    time = 1.0 - torch.special.expit(mean + std * torch.special.ndtri(quantiles))
    earliest = 1.0 / (1.0 + math.exp(0.5 * LOGSNR_MAX))
    latest = 1.0 / (1.0 + math.exp(0.5 * LOGSNR_MIN))
    descending = (1.0 - time.clamp(earliest, latest)).flip(0)
    descending[-1] = last  # the clamp leaves LAST_SIGMA of noise
    return descending[-(steps + 1) :].to(torch.float32)


def start_latents(noise: Tensor, clean: Tensor | None, sigma: float) -> Tensor:
    """x = sigma * noise + (1 - sigma) * clean; the noise itself where there is nothing clean."""
    if clean is None:
        return noise
    return sigma * noise + (1.0 - sigma) * clean.to(noise)
