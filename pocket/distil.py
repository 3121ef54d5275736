"""Distils one branch out of two: `python -m ideogram4_quant.pocket.distil`.

The guided pair is the teacher: noise and caption -> picture, 20 steps of the Default preset. The
student starts as the conditional copy, at the scale at which it is a velocity by itself, and learns
the teacher's picture of the same noise in 8 steps without guidance, in two stages:

- `guided`: on the teacher's own path the student's velocity is the teacher's guided velocity;
- `few`: half of each batch lies on the straight line between the noise and the teacher's picture
  (v = x_teacher - noise, as in rectified flow), half on the student's own 8-step path, where the
  velocity is the one that ends in the teacher's picture, v = (x_teacher - x) / sigma.

Seeded; goes on from its last checkpoint in `--work`, though not to the same bits: the student's
paths are made anew then.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import prompt_batch
from .encoder import CaptionEncoder
from .export import STRENGTH, export_transformer, load_encoder, load_transformer
from .paths import WEIGHTS
from .train import keep_freed_memory
from .transformer import DEFAULT_GUIDANCE, sigmas, velocity

STUDENT_STEPS = 8


@dataclass(frozen=True)
class Distillation:
    """Steps and rates. A new teacher batch comes every `fresh` steps, `kept` of them stay."""

    guided: int = 200
    few: int = 1100
    batch: int = 16
    seed: int = 8
    rate: float = 3e-4
    warmup: int = 50
    ema: float = 0.995
    fresh: int = 12
    kept: int = 48
    rollout: int = 6  # steps between two rollouts of the student

    @property
    def steps(self) -> int:
        return self.guided + self.few

    def rate_at(self, step: int) -> float:
        """The learning rate: a warm-up, then a straight line to nothing."""
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(1 - step / self.steps, 0.02)


@dataclass
class TeacherBatch:
    """Captions as features, the teacher's latents [21, B, 32, 128] and velocities [20, ...]."""

    features: Tensor
    lengths: list[int]
    path: Tensor
    velocities: Tensor
    student: Tensor | None = None  # the student's own path [8, B, 32, 128]


@torch.no_grad()
def teacher_batch(
    index: int, plan: Distillation, encoder: CaptionEncoder, cond, uncond
) -> TeacherBatch:
    """The teacher's pictures of prompts and noise that are functions of `index`."""
    prompts = prompt_batch(f"distil {plan.seed} {index}", plan.batch)
    features, lengths = encoder([p.caption for p in prompts])
    generator = torch.Generator().manual_seed(plan.seed * 10**7 + index)
    x = torch.randn(plan.batch, 32, 128, generator=generator)
    path, velocities, schedule = [x], [], sigmas(len(DEFAULT_GUIDANCE))
    for g, here, there in zip(DEFAULT_GUIDANCE, schedule[:-1], schedule[1:], strict=True):
        t = (1 - here).expand(len(x))
        v = g * velocity(cond, x, t, features, lengths) + (1 - g) * velocity(uncond, x, t)
        x = x + (here - there) * v
        path.append(x)
        velocities.append(v)
    return TeacherBatch(features, lengths, torch.stack(path), torch.stack(velocities))


class Distiller:
    """Teacher, student, its average, optimiser, checkpoint and log in `folder`."""

    def __init__(self, plan: Distillation, folder: Path, weights: Path = WEIGHTS):
        self.plan, self.folder = plan, folder
        self.encoder = load_encoder(weights)
        self.cond, self.uncond = (load_transformer(c, weights) for c in ("cond", "uncond"))
        self.student = unscaled(load_transformer("cond", weights)).requires_grad_(True)
        self.ema = copy.deepcopy(self.student).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0, fused=True
        )
        self.step, self.batches = 0, {}
        self.path = folder / "distil.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.ema.load_state_dict(state["ema"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = state["step"]

    def save(self) -> None:
        """Writes the checkpoint through a temporary file."""
        state = {name: getattr(self, name).state_dict() for name in ("student", "ema", "optimiser")}
        torch.save(state | {"step": self.step}, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def _batch(self) -> TeacherBatch:
        newest = self.step // self.plan.fresh
        rng = random.Random(f"distil batch {self.plan.seed} {self.step}")
        index = rng.randrange(max(0, newest - self.plan.kept), newest + 1)
        if index not in self.batches:
            self.batches[index] = teacher_batch(
                index, self.plan, self.encoder, self.cond, self.uncond
            )
            self.batches.pop(newest - self.plan.kept - 1, None)
        return self.batches[index]

    @torch.no_grad()
    def _rollout(self, batch: TeacherBatch) -> Tensor:
        x, states, schedule = batch.path[0], [], sigmas(STUDENT_STEPS)
        for here, there in itertools.pairwise(schedule):
            states.append(x)
            v = velocity(self.student, x, (1 - here).expand(len(x)), batch.features, batch.lengths)
            x = x + (here - there) * v
        return torch.stack(states)

    def _guided(self, batch: TeacherBatch, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x, sigma, velocity) on the teacher's path, a random step for each picture."""
        count = self.plan.batch
        k = torch.randint(len(batch.velocities), (count,), generator=g)
        rows = torch.arange(count)
        return batch.path[k, rows], sigmas(len(DEFAULT_GUIDANCE))[k], batch.velocities[k, rows]

    def _few(self, batch: TeacherBatch, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x, sigma, velocity): the straight line in the first half, the student's path after."""
        if batch.student is None or self.step % self.plan.rollout == 0:
            batch.student = self._rollout(batch)
        count = self.plan.batch
        k = torch.randint(STUDENT_STEPS, (count,), generator=g)
        x, sigma = batch.student[k, torch.arange(count)], sigmas(STUDENT_STEPS)[k]
        half = count // 2
        sigma[:half] = torch.sigmoid(torch.randn(half, generator=g) * 1.75 - 1.73)
        sigma[: half // 4] = sigmas(STUDENT_STEPS)[0]
        end = batch.path[-1]
        x[:half] = torch.lerp(end, batch.path[0], sigma[:, None, None])[:half]
        return x, sigma, (end - x) / sigma[:, None, None]

    def train_step(self) -> float:
        """One optimiser step; returns the loss, the squared error of velocities times sigma."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        generator = torch.Generator().manual_seed(self.plan.seed * 10**8 + self.step)
        batch = self._batch()
        stage = self._guided if self.step < self.plan.guided else self._few
        x, sigma, target = stage(batch, generator)
        out = velocity(self.student, x, 1 - sigma, batch.features, batch.lengths)
        loss = ((out - target).square().mean((1, 2)) * sigma).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.plan.ema, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.student.parameters()), 1 - decay
            )
        return loss.item()

    def run(self, save_every: int = 100) -> None:
        """Trains to the last step, logging every 20 steps."""
        started, losses = time.time(), []
        while self.step < self.plan.steps:
            losses.append(self.train_step())
            if self.step % 20 == 0:
                seconds = round(time.time() - started, 1)
                row = {"step": self.step, "seconds": seconds, "loss": sum(losses) / len(losses)}
                with (self.folder / "distil.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                losses = []
            if self.step % save_every == 0 or self.step == self.plan.steps:
                self.save()


@torch.no_grad()
def unscaled(model):
    """The conditional copy at its own scale: undoes `export.for_presets`, which scales by w / 7."""
    for tensor in model.final_layer.linear.parameters():
        tensor.mul_(7 / STRENGTH)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".pocket-distil"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint and end")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    distiller = Distiller(Distillation(), args.work)
    if not args.export:
        distiller.run()
    export_transformer(distiller.ema.state_dict(), "one_branch", args.out)


if __name__ == "__main__":
    main()
