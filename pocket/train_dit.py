"""Training of the two copies of the transformer, the conditional and the unconditional.

Flow matching: x_t = (1 - t) * noise + t * x, target v = x - noise. All batches are a function of
(stage, step), so a run that was cut off goes on exactly where its last checkpoint stood.
"""

import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .coupling import coupled_tokens, tiled_tokens
from .data import COLUMNS, TILES, PocketPrompt, picture_batch, prompt_batch, random_levels
from .encoder import CaptionEncoder
from .latents import LinearLatents
from .reader import HIDDEN, Reader
from .transformer import build_transformer, velocity


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `early` and `mean` shape the times (see `times`). From t = `fade_from` on the loss fades with
    1 - t: the velocity there is mostly noise to be told from a picture that is all but finished.
    `stream` names the random numbers of prompts and pictures (default: `name`).
    """

    name: str
    steps: int
    stream: str = ""
    batch: int = 16
    seed: int = 0
    block_lr: float = 1e-2
    other_lr: float = 1e-3
    warmup: int = 60
    cooldown: int = 0
    letter_weight: float = 0.0
    fact_weight: float = 0.0
    pictures: Literal["free", "coupled", "fine", "coarse"] = "coarse"
    start_from: str = "ema"
    early: float = 1 / 16
    mean: float = 0.5
    fade_from: float = 1.0
    ema: float = 0.998
    conditional: bool = True


class FeaturePool:
    """Encoded prompt batches: three in ten steps see a fresh one, the others a recent one."""

    def __init__(self, encoder: CaptionEncoder, stage: Stage, size: int = 160):
        self.encoder, self.stage, self.size = encoder, stage, size
        self.kept: dict[int, tuple[list[PocketPrompt], Tensor, list[int]]] = {}

    def __call__(self, step: int) -> tuple[list[PocketPrompt], Tensor, list[int]]:
        newest = 8 + int(0.3 * step)
        rng = random.Random(f"pool {self.stage.stream or self.stage.name} {self.stage.seed} {step}")
        fresh = int(0.3 * step) != int(0.3 * (step - 1))
        index = newest if fresh else rng.randrange(max(0, newest - self.size), newest + 1)
        if index not in self.kept:
            seed = f"prompts {self.stage.stream or self.stage.name} {self.stage.seed} {index}"
            prompts = prompt_batch(seed, self.stage.batch, self.stage.pictures in TILES)
            self.kept[index] = (prompts, *self.encoder([p.caption for p in prompts]))
            self.kept.pop(index - self.size - 1, None)
        return self.kept[index]


def times(n: int, generator: torch.Generator, mean: float, early: float) -> Tensor:
    """Training times: logit-normal(mean, 1.5), a share `early` of them uniform in [0, 0.06].

    The Default preset takes its first step at t = 0 and three more below t = 0.5.
    """
    t = torch.sigmoid(torch.randn(n, generator=generator) * 1.5 + mean)
    first = torch.rand(n, generator=generator) < early
    return torch.where(first, torch.rand(n, generator=generator) * 0.06, t)


class DitTrainer:
    """One stage: model, EMA, optimiser, checkpoint and log in `folder`."""

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        latents: LinearLatents,
        encoder: CaptionEncoder,
        init: Path | None = None,
    ):
        self.stage, self.folder, self.latents = stage, folder, latents
        torch.manual_seed(stage.seed)
        self.model = build_transformer()
        _initialise(self.model)
        if init:
            self.model.load_state_dict(torch.load(init, weights_only=True)[stage.start_from])
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.reader = Reader(self.model, stage.fact_weight) if stage.letter_weight else None
        self.pool = FeaturePool(encoder, stage)
        self.optimiser = self._optimiser()
        self.step = 0
        self.path = folder / f"{stage.name}.pt"
        if self.path.exists():
            self._resume()

    def _optimiser(self) -> torch.optim.AdamW:
        blocks, others = [], []
        for name, p in self.model.named_parameters():
            is_block = name.startswith("layers.") and p.ndim == 2 and "adaln" not in name
            (blocks if is_block else others).append(p)
        others += list(self.reader.parameters()) if self.reader else []
        groups = [
            {"params": blocks, "weight_decay": 0.01, "peak": self.stage.block_lr},
            {"params": others, "weight_decay": 0.0, "peak": self.stage.other_lr},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.reader:
            self.reader.load_state_dict(state["reader"])
        self.step = state["step"]

    def save(self) -> None:
        """Writes the checkpoint through a temporary file."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "reader": self.reader.state_dict() if self.reader else None,
            "step": self.step,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def _set_rates(self) -> None:
        rate = min(1.0, (self.step + 1) / self.stage.warmup)
        if self.stage.cooldown:
            rate *= min(1.0, (self.stage.steps - self.step) / self.stage.cooldown)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * max(rate, 0.01)

    def _tokens(self, prompts: list[PocketPrompt], noise: Tensor) -> Tensor:
        if self.stage.pictures in TILES:
            return tiled_tokens(prompts, noise, self.latents, self.stage.pictures)
        if self.stage.pictures == "coupled":
            return coupled_tokens(prompts, noise, self.latents)
        rng = random.Random(
            f"pictures {self.stage.stream or self.stage.name} {self.stage.seed} {self.step}"
        )
        pictures = picture_batch(prompts, random_levels(len(prompts), rng))
        return self.latents.tokens(torch.tensor(pictures))

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of this step's batch, and what to log of it."""
        stage, step = self.stage, self.step
        generator = torch.Generator().manual_seed(stage.seed * 10**7 + step)
        if stage.conditional:
            prompts, features, lengths = self.pool(step)
        else:
            prompts = prompt_batch(f"prompts {stage.name} {stage.seed} {step}", stage.batch)
            features, lengths = None, None
        noise = torch.randn(stage.batch, 4 * COLUMNS, 128, generator=generator)
        x = self._tokens(prompts, noise)
        t = times(len(x), generator, stage.mean, stage.early)
        x_t = torch.lerp(noise, x, t[:, None, None])
        target = x - noise
        out = velocity(self.model, x_t, t, features, lengths)
        losses = (out - target).square().mean((1, 2))
        log = {"loss": losses.mean().item()}
        loss = (losses * ((1 - t) / (1 - stage.fade_from + 1e-9)).clamp(0.02, 1)).mean()
        if self.reader:
            reading, more = self.reader(prompts)
            loss, log = loss + stage.letter_weight * reading, log | more
        return loss, log

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what to log."""
        self._set_rates()
        loss, log = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(self.stage.ema, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - decay
            )
        self.step += 1
        return log

    def run(self, save_every: int = 200) -> None:
        """Trains to the stage's last step, logging every 20 steps."""
        log_path, logs = self.folder / f"{self.stage.name}.jsonl", []
        started = time.time()
        while self.step < self.stage.steps:
            logs.append(self.train_step())
            if self.step % 20 == 0:
                row = {"step": self.step, "seconds": round(time.time() - started, 1)}
                row |= {k: sum(entry[k] for entry in logs) / len(logs) for k in logs[0]}
                with log_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                logs = []
            if self.step % save_every == 0 or self.step == self.stage.steps:
                self.save()


def _initialise(model) -> None:
    """Gates start at tanh(0.5), the output at zero."""
    for block in model.layers:
        torch.nn.init.normal_(block.adaln_modulation.weight, 0, 0.02)
        torch.nn.init.zeros_(block.adaln_modulation.bias)
        with torch.no_grad():
            block.adaln_modulation.bias[HIDDEN : 2 * HIDDEN] = 0.5
            block.adaln_modulation.bias[3 * HIDDEN :] = 0.5
    torch.nn.init.zeros_(model.final_layer.linear.weight)
