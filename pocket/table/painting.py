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
from ..data import HEIGHT, HELD_OUT, WIDTH
from ..paths import encoder_dir, vae_dir

#: Prompts sampled together: the fastest on one core.
BATCH = 16
PRESET = "default"
#: Prompts in a part of the table.
PART = len(HELD_OUT) // 2
_NEXT_SEED = 10_000


def cases_of_part(part: int) -> list[Case]:
    """The pictures of one part of the table: half of the prompts with one seed each, so that two
    parts hold every prompt once, with its own seed first."""
    half = HELD_OUT[(part % 2) * PART : (part % 2 + 1) * PART]
    return [
        Case(p.caption, p.seed + _NEXT_SEED * (part // 2), p.width, p.height, text=p.word)
        for p in half
    ]


@dataclass(frozen=True)
class Painted:
    """Pictures, their latents after every step [n, steps, tokens, channels], seconds a picture."""

    pictures: list[Image.Image]
    trajectories: Tensor
    seconds: float


class Studio:
    """What all systems share: the prompts' features, encoded once, and the VAE."""

    def __init__(self) -> None:
        encoder = load_encoder(encoder_dir(), device="cpu")
        captions = [prompt.caption for prompt in HELD_OUT]
        self.features = dict(zip(captions, encoder.encode(captions), strict=True))
        self.vae = load_vae(vae_dir(), device="cpu")
        self.steps = GenerateRequest("", WIDTH, HEIGHT, preset=PRESET).plan()

    def paint(
        self, models: Models, cases: Sequence[Case], progress: Callable[[int], object] | None = None
    ) -> Painted:
        """One picture a case; the prompts are held-out ones."""
        started = time.process_time()
        pictures: list[Image.Image | None] = [None] * len(cases)
        paths: list[Tensor | None] = [None] * len(cases)
        rows, columns = grid_size(WIDTH, HEIGHT)
        unconditional = prepare(models.unconditional, rows, columns)
        for batch in self._batches(cases):
            features = torch.stack([self.features[cases[i].prompt] for i in batch])
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

    def _batches(self, cases: Sequence[Case]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for i, case in enumerate(cases):
            groups.setdefault(len(self.features[case.prompt]), []).append(i)
        return [
            group[i : i + BATCH]
            for _, group in sorted(groups.items())
            for i in range(0, len(group), BATCH)
        ]
