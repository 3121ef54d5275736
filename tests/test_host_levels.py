"""Every level in a real ComfyUI against the same level in the diffusers engine."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, generate, initial_noise
from ideogram4_quant.engine.transformer import load_transformer
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.tests.host.level_files import ALL_LEVELS as LEVELS
from ideogram4_quant.tests.host.level_files import write_level

pytestmark = pytest.mark.host
WIDTH, HEIGHT, SEED = 128, 64, 3
COPIES = ("conditional", "unconditional")
TWO = ("INT8 W8A8 rotated", "Q4_K")
PAIR = " + ".join(TWO)


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory) -> dict[str, dict[str, str]]:
    """level -> copy -> file, each made from the pocket model; and a pair of two levels."""
    folder = tmp_path_factory.mktemp("levels")
    pair = list(zip(COPIES, (pocket.conditional_file, pocket.unconditional_file), strict=True))
    found = {
        level: {copy: str(write_level(source, level, folder, copy)) for copy, source in pair}
        for level in LEVELS
    }
    return found | {PAIR: {c: found[level][c] for c, level in zip(COPIES, TWO, strict=True)}}


@pytest.fixture(scope="module")
def pictures(pocket, files) -> dict:
    """The engine's pictures of every level, and what they were made from."""
    encoder = load_encoder(pocket.encoder_dir, device="cpu")
    features = encoder.encode([HELD_OUT[0].caption])[0]
    request = GenerateRequest("", WIDTH, HEIGHT, SEED)
    vae = load_vae(pocket.vae_dir, device="cpu")
    noise = initial_noise(SEED, HEIGHT // 16 * (WIDTH // 16), 128)
    latents = {}
    for level, paths in files.items():
        copies = [
            load_transformer(open_checkpoint(paths[copy]), copy, device="cpu") for copy in COPIES
        ]
        models = Models(*copies, None, vae)
        latents[level] = generate(request, models, features=features, noise=noise).latents
    return {"latents": latents, "vae": vae, "features": features, "noise": noise[0]}


@pytest.fixture(scope="module")
def host_run(files, pictures, in_host, tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("host")
    levels, inputs, out = folder / "levels.json", folder / "inputs.safetensors", folder / "out"
    levels.write_text(json.dumps(files))
    save_file({key: pictures[key].float().contiguous() for key in ("features", "noise")}, inputs)
    result = in_host("levels.py", levels, inputs, out, json.dumps([WIDTH, HEIGHT]))
    return load_file(out), result["quantized"]


def decode(vae, tokens: torch.Tensor) -> torch.Tensor:
    picture = vae.decode(tokens[None], HEIGHT // 16, WIDTH // 16)
    return torch.from_numpy(np.asarray(picture[0], dtype=np.float64) / 255)


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = ((found - wanted) ** 2).mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


@pytest.mark.parametrize("level", [*LEVELS, PAIR])
def test_picture_equals_the_engine(level, pictures, host_run):
    found = decode(pictures["vae"], host_run[0][level])
    wanted = decode(pictures["vae"], pictures["latents"][level])
    assert psnr(found, wanted) > (60 if level == "BF16" else 45)


def test_levels_differ_from_each_other(host_run):
    latents = host_run[0]
    for level in LEVELS[1:]:
        assert not torch.equal(latents[level], latents["BF16"]), level
    assert not any(torch.equal(latents[PAIR], latents[level]) for level in TWO)


def test_linears_stay_quantized_in_the_host(host_run, files):
    quantized = host_run[1]
    assert quantized["BF16"] == 0
    for level in LEVELS[1:]:
        assert quantized[level] >= 4 * 6, level
