"""Training of the two copies of the transformer: conditional, unconditional, guided.

Flow matching: x_t = (1 - t) * noise + t * x, target v = x - noise. All batches are a function of
(stage, step), so a run that was cut off goes on exactly where its last checkpoint stood.

Noise and picture are coupled, as optimal transport would have it: of what the caption leaves open
(tiles; in the `facts` stage heights) that is drawn which lies nearest to the noise. At 128 x 64 px
the Default preset's first Euler step crosses a quarter of the path from t = 0. With independent
noise the velocity there points to the mean of all possible pictures, and what is chosen one step
later in one place need not go with what is chosen in another.
"""

import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import (
    COLOURS,
    COLUMNS,
    LETTERS,
    LEVELS,
    ROWS,
    SHAPES,
    STYLES,
    TILES,
    PocketPrompt,
    picture_batch,
    prompt_batch,
    random_levels,
    tiled_pair,
)
from .encoder import CaptionEncoder
from .latents import LinearLatents
from .transformer import build_transformer, velocity

HIDDEN = 256
READ_AFTER_BLOCK = 2


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


def coupled_tokens(prompts: list[PocketPrompt], noise: Tensor, latents: LinearLatents) -> Tensor:
    """x = argmax_k <noise, x_k> over the heights k, in the word's and the shape's columns apart."""
    pairs = [(k, k) for k in LEVELS]
    pictures = [picture_batch([prompt] * len(LEVELS), pairs) for prompt in prompts]
    tokens = latents.tokens(torch.tensor(np.concatenate(pictures)))
    tokens = tokens.view(len(prompts), len(LEVELS), 4, COLUMNS, -1)
    match = (tokens * noise.view(len(prompts), 1, 4, COLUMNS, -1)).sum((2, 4))  # [B, 3, columns]
    chosen = []
    for prompt, choice, score in zip(prompts, tokens, match, strict=True):
        beside = torch.zeros(COLUMNS, dtype=torch.bool)
        beside[prompt.shape_columns] = prompt.shape is not None
        word, shape = score[:, ~beside].sum(1).argmax(), score[:, beside].sum(1).argmax()
        chosen.append(torch.where(beside[:, None], choice[shape], choice[word]))
    return torch.stack(chosen).flatten(1, 2)


def tiled_tokens(
    prompts: list[PocketPrompt], noise: Tensor, latents: LinearLatents, kind: str = "coarse"
) -> Tensor:
    """Per tile: shaded where <noise, shaded - plain> / |shaded - plain| is in its upper quarter."""
    pictures = np.concatenate([tiled_pair(prompt, kind) for prompt in prompts])
    blocks = 4 if kind == "fine" else 1  # tiles in a token
    tokens = latents.tokens(torch.tensor(pictures)).unflatten(-1, (blocks, -1))
    plain, shaded = tokens.unflatten(0, (-1, 2)).unbind(1)  # [B, 32, blocks, 128 / blocks]
    change = shaded - plain
    match = (noise.unflatten(-1, (blocks, -1)) * change).sum(-1, keepdim=True)
    upper = match > 0.674 * change.norm(dim=-1, keepdim=True)
    return torch.where(upper, shaded, plain).flatten(-2)


def _facts(prompt: PocketPrompt) -> list[int]:
    """What a caption states besides the word, as classes (see `FACTS`)."""
    inks, grounds = list(COLOURS), list(COLOURS)
    return [
        inks.index(prompt.ink),
        grounds.index(prompt.ground),
        STYLES.index(prompt.style),
        list(ROWS).index(prompt.row) if prompt.row else len(ROWS),
        SHAPES.index(prompt.shape) if prompt.shape else len(SHAPES),
        inks.index(prompt.shape_ink) if prompt.shape else len(COLOURS),
    ]


FACTS = (len(COLOURS), len(COLOURS), len(STYLES), len(ROWS) + 1, len(SHAPES) + 1, len(COLOURS) + 1)


class Reader(torch.nn.Module):
    """The auxiliary head, thrown away later: what each image token knows after block 2.

    Which letter, or none, the token's column holds; the inks, the ground, the style, the shape.
    Without it text does not bind for thousands of steps.
    """

    def __init__(self, model, fact_weight: float):
        super().__init__()
        self.fact_weight = fact_weight
        self.linear = torch.nn.Linear(HIDDEN, len(LETTERS) + 1 + sum(FACTS))
        self.seen: list[Tensor] = []
        block = model.layers[READ_AFTER_BLOCK - 1]
        block.register_forward_hook(lambda module, args, out: self.seen.append(out))

    def forward(self, prompts: list[PocketPrompt]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy on the tokens just seen, and the shares read right."""
        hidden = self.seen.pop()[:, -4 * COLUMNS :]
        scores = self.linear(F.rms_norm(hidden, (HIDDEN,), eps=1e-5))
        letters, *facts = scores.split([len(LETTERS) + 1, *FACTS], -1)
        loss, letters_right = self._letters(prompts, letters)
        truth = torch.tensor([_facts(p) for p in prompts])[:, None].expand(-1, hidden.shape[1], -1)
        right = 0.0
        for i, fact in enumerate(facts):
            target = truth[..., i].flatten()
            loss = loss + self.fact_weight * F.cross_entropy(fact.flatten(0, 1), target)
            right += (fact.argmax(-1).flatten() == target).float().mean().item() / len(facts)
        return loss, {"letters_right": letters_right, "facts_right": right}

    @staticmethod
    def _letters(prompts: list[PocketPrompt], scores: Tensor) -> tuple[Tensor, float]:
        target = torch.full((len(prompts), COLUMNS), len(LETTERS))
        for row, prompt in zip(target, prompts, strict=True):
            for i, letter in enumerate(prompt.word):
                row[prompt.column + i] = LETTERS.index(letter)
        target = target[:, None].expand(-1, 4, -1).flatten()
        scores = scores.flatten(0, 1)
        is_letter = target < len(LETTERS)
        weight = torch.where(is_letter, 1.0, 0.3)
        losses = F.cross_entropy(scores, target, reduction="none")
        right = (scores.argmax(-1) == target)[is_letter].float().mean().item()
        return (losses * weight).sum() / weight.sum(), right


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
                with log_path.open("a") as file:
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
