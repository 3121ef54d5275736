"""Second moments in full of what the blocks' linears read: what the peers' calibrations take.

Ours keep blocks of 512 inputs, which at the real model's width is all that fits; the peers get the
whole matrix, from the same captions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...engine.calibrate import watched
from ...engine.encoder import load_encoder
from ...engine.generate import GenerateRequest, Models, initial_noise, sample
from ...engine.loading import COPIES
from ...engine.transformer import load_transformer, prepare
from ...files.new_file import replaced
from ...sampling import grid_size
from ..data import HEIGHT, WIDTH, prompt_batch
from ..paths import encoder_dir
from .calibrating import PROMPTS
from .models import Variant, in_memory, state_of
from .painting import BATCH, PRESET
from .systems import is_block


def moments_of(variant: Variant, work: Path) -> dict[str, Tensor]:
    """``copy.linear`` -> the mean of x x^T, fp32 [K, K]; read from ``work``, or made there."""
    file = work / "moments" / f"{variant.slug}-{PROMPTS}.safetensors"
    if not file.is_file():
        found = _measured(variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as part:
            save_file(found, part)
    return load_file(file)


@torch.no_grad()
def _measured(variant: Variant) -> dict[str, Tensor]:
    models = Models(
        *(
            load_transformer(in_memory(variant, state_of(variant, copy)), copy, device="cpu")
            for copy in COPIES
        ),
        None,
        None,
    )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        total = rows.t() @ rows
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(rows)

    for name, module in watched(models).items():
        if is_block(name.partition(".")[2]):
            module.register_forward_pre_hook(partial(watch, name))
    _sample(models)
    return {name: total / counts[name] for name, total in sums.items()}


def _sample(models: Models) -> None:
    """Every calibration caption once, those of one length together, each from noise of its own."""
    captions = [prompt.caption for prompt in prompt_batch("calibration", PROMPTS)]
    features = load_encoder(encoder_dir(), device="cpu").encode(captions)
    steps = GenerateRequest("", WIDTH, HEIGHT, preset=PRESET).plan()
    rows, columns = grid_size(WIDTH, HEIGHT)
    channels = models.conditional.config.in_channels
    unconditional = prepare(models.unconditional, rows, columns)
    lengths: dict[int, list[int]] = {}
    for i, some in enumerate(features):
        lengths.setdefault(len(some), []).append(i)
    for alike in lengths.values():
        for at in range(0, len(alike), BATCH):
            batch = alike[at : at + BATCH]
            text = torch.stack([features[i] for i in batch])
            conditional = prepare(models.conditional, rows, columns, text)
            noise = torch.cat([initial_noise(i, rows * columns, channels) for i in batch])
            for _ in sample(models, steps, noise, conditional, unconditional):
                pass
