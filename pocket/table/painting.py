"""Held-out prompts painted in batches of one length, with nothing padded and nothing masked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ...engine.compare.cases import Case
from ...engine.encoder import load_encoder
from ...engine.generate import GenerateRequest, Models, initial_noise, sample
from ...engine.transformer import prepare
from ...engine.vae import load_vae
from ...sampling import grid_size
from ..data import HEIGHT, WIDTH, PocketPrompt
from ..paths import encoder_dir, vae_dir

#: Prompts sampled together: the fastest on one core.
BATCH = 16
PRESET = "default"
_NEXT_SEED = 10_000


def case_of(prompt: PocketPrompt, round_: int) -> Case:
    """The prompt with its own seed, or in later rounds with another."""
    seed = prompt.seed + _NEXT_SEED * round_
    return Case(prompt.caption, seed, prompt.width, prompt.height, text=prompt.word)


@dataclass(frozen=True)
class Painted:
    """Pictures, their latents after every step [n, steps, tokens, channels], seconds a picture."""

    pictures: list[Image.Image]
    trajectories: Tensor
    seconds: float


class Studio:
    """What all systems share: the prompts' features, encoded once, and the VAE."""

    def __init__(self, prompts: Sequence[PocketPrompt]) -> None:
        encoder = load_encoder(encoder_dir(), device="cpu")
        self.features = encoder.encode([p.caption for p in prompts])
        self.vae = load_vae(vae_dir(), device="cpu")
        self.steps = GenerateRequest("", WIDTH, HEIGHT, preset=PRESET).plan()

    def paint(
        self, models: Models, cases: Sequence[Case], progress: Callable[[int], object] | None = None
    ) -> Painted:
        """One picture a case; ``cases[i]`` belongs to the i-th prompt."""
        started = time.process_time()
        pictures: list[Image.Image | None] = [None] * len(cases)
        paths: list[Tensor | None] = [None] * len(cases)
        rows, columns = grid_size(WIDTH, HEIGHT)
        unconditional = prepare(models.unconditional, rows, columns)
        for batch in self._batches():
            features = torch.stack([self.features[i] for i in batch])
            conditional = prepare(models.conditional, rows, columns, features)
            channels = models.conditional.config.in_channels
            noise = [initial_noise(cases[i].seed, rows * columns, channels) for i in batch]
            walk = sample(models, self.steps, torch.cat(noise), conditional, unconditional)
            trajectory = torch.stack([x for _, x in walk], dim=1)
            for i, path, image in zip(
                batch, trajectory, self.vae.decode(trajectory[:, -1], rows, columns), strict=True
            ):
                pictures[i], paths[i] = image, path
            if progress is not None:
                progress(len(batch))
        seconds = (time.process_time() - started) / len(cases)
        return Painted(pictures, torch.stack(paths), seconds)

    def _batches(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for i, features in enumerate(self.features):
            groups.setdefault(len(features), []).append(i)
        return [
            group[i : i + BATCH]
            for _, group in sorted(groups.items())
            for i in range(0, len(group), BATCH)
        ]
