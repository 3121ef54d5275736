"""Sampling with a pair of copies, with the velocities of each at hand: captions of one length at
once, nothing padded and nothing masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.compare.cases import Case
from ...engine.encoder import load_encoder
from ...engine.generate import GenerateRequest, initial_noise
from ...engine.transformer import PackTransformer, Prepared, prepare, velocity
from ...sampling import StepPlan, euler_step, grid_size
from ..data import HEIGHT, WIDTH
from ..paths import encoder_dir
from ..table.painting import BATCH, PRESET

GRID = grid_size(WIDTH, HEIGHT)


@dataclass(frozen=True)
class Batch:
    """Captions of one length: ``cases`` are their places, ``features`` [B, T, F], ``noise``
    [B, N, C]."""

    cases: tuple[int, ...]
    features: Tensor
    noise: Tensor

    @property
    def text(self) -> int:
        """Text tokens of each caption."""
        return self.features.shape[1]


@dataclass(frozen=True)
class Both:
    """A pair ready for one batch, and the factors a, b of ``a v_c - b v_u``."""

    models: tuple[PackTransformer, PackTransformer]
    prepared: tuple[Prepared, Prepared]
    factors: tuple[float, float]

    def velocities(self, x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """(a v_c, b v_u) at x [B, N, C]."""
        first, second = (
            factor * velocity(model, x, time, prepared)
            for model, prepared, factor in zip(
                self.models, self.prepared, self.factors, strict=True
            )
        )
        return first, second

    def walk(self, x: Tensor, steps: Sequence[StepPlan]) -> Tensor:
        """Latents after every step, [steps, B, N, C]."""
        path = []
        for step in steps:
            first, second = self.velocities(x, step.time)
            x = euler_step(x, first - second, step.sigma, step.sigma_next)
            path.append(x)
        return torch.stack(path)


def steps() -> tuple[StepPlan, ...]:
    """The Default preset's steps; their guidance is not looked at here."""
    return GenerateRequest("", WIDTH, HEIGHT, preset=PRESET).plan()


def batches(cases: Sequence[Case], channels: int = 128) -> list[Batch]:
    """The cases by the length of their captions, each with the noise of its seed."""
    encoder = load_encoder(encoder_dir(), device="cpu")
    features = encoder.encode([case.prompt for case in cases])
    groups: dict[int, list[int]] = {}
    for i, found in enumerate(features):
        groups.setdefault(len(found), []).append(i)
    tokens = GRID[0] * GRID[1]
    return [
        Batch(
            tuple(part),
            torch.stack([features[i] for i in part]),
            torch.cat([initial_noise(cases[i].seed, tokens, channels) for i in part]),
        )
        for _, group in sorted(groups.items())
        for part in (group[i : i + BATCH] for i in range(0, len(group), BATCH))
    ]


def both(
    models: tuple[PackTransformer, PackTransformer], factors: tuple[float, float], batch: Batch
) -> Both:
    """A pair made ready for a batch."""
    prepared = prepare(models[0], *GRID, batch.features), prepare(models[1], *GRID)
    return Both(models, prepared, factors)


def decibels(truth: Tensor, found: Tensor) -> Tensor:
    """SQNR of each picture, dB [B], of latents [B, N, C]."""
    noise = (found - truth).double().square().sum((1, 2))
    return 10 * (truth.double().square().sum((1, 2)) / noise).log10()


def finals(
    models: tuple[PackTransformer, PackTransformer],
    factors: tuple[float, float],
    parts: Sequence[Batch],
) -> Tensor:
    """Final latents of all cases in their order, [cases, N, C]."""
    found: dict[int, Tensor] = {}
    for batch in parts:
        last = both(models, factors, batch).walk(batch.noise, steps())[-1]
        found |= dict(zip(batch.cases, last, strict=True))
    return torch.stack([found[i] for i in range(len(found))])
