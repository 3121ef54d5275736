"""Calibrate both copies on the engine: prompts and seeds are sampled twice, under two hooks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor, nn

from ..quant.calibration import Calibration, Run
from ..quant.calibration_passes import run_passes
from ..quant.profiler import Profiler, ProfilerOptions
from ..sampling import grid_size
from ..version import __version__
from .generate import GenerateRequest, Models, initial_noise, sample
from .linear import QuantLinear
from .transformer import canonical_name, prepare

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompt:
    """A caption and its features [L, llm_features_dim]."""

    text: str
    features: Tensor


def calibrate(
    models: Models,
    prompts: Sequence[Prompt],
    request: GenerateRequest,
    *,
    seeds: Sequence[int] = (0,),
    digests: Mapping[str, str],
    options: ProfilerOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Watch every linear of both copies while ``prompts`` x ``seeds`` are sampled.

    ``request`` gives size, preset, steps and guidance; its prompt and seed are not used.
    ``digests`` is copy -> SHA-256 of its file. ``progress(done, total)`` counts steps of both
    passes. ``run_passes`` says from which noise each prompt starts.
    Encoder and VAE are not needed.
    """
    steps = request.plan()
    rows, columns = grid_size(request.width, request.height)
    shape = (rows * columns, models.conditional.config.in_channels)
    device = models.conditional.embed_image_indicator.weight.device
    profiler = Profiler(watched(models), [step.time for step in steps], options)
    total, done = 2 * len(prompts) * len(seeds) * len(steps), 0

    unconditional = None
    if models.unconditional is not None:
        unconditional = prepare(models.unconditional, rows, columns)

    def run(index: int, noise: int) -> None:
        nonlocal done
        profiler.at(steps[0].time)
        features = prompts[index].features[None].to(device)
        conditional = prepare(models.conditional, rows, columns, features)
        x = initial_noise(noise, *shape).to(device)
        for step, _ in sample(models, steps, x, conditional, unconditional):
            if step.index + 1 < len(steps):
                profiler.at(steps[step.index + 1].time)
            done += 1
            if progress is not None:
                progress(done, total)

    run_passes(profiler, len(prompts), seeds, run)
    captions = json.dumps([prompt.text for prompt in prompts])
    return profiler.result(
        Run(
            models=dict(digests),
            prompts_sha256=hashlib.sha256(captions.encode()).hexdigest(),
            prompts=len(prompts),
            seeds=tuple(seeds),
            steps=len(steps),
            width=request.width,
            height=request.height,
            versions={"ideogram4-quant": __version__, "torch": torch.__version__},
        )
    )


def watched(models: Models) -> dict[str, nn.Module]:
    """Every linear by copy and canonical name."""
    found = {}
    copies: dict[str, Ideogram4Transformer2DModel | None] = {
        "conditional": models.conditional,
        "unconditional": models.unconditional,
    }
    for copy, model in copies.items():
        for path, module in () if model is None else model.named_modules():
            if isinstance(module, QuantLinear):
                name = canonical_name(f"{path}.weight").removesuffix(".weight")
                found[f"{copy}.{name}"] = module
    return found
