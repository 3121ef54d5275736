"""Training of the VAE: a decoder that inverts the linear latent map, an encoder that learns it.

Decoder: L1 + L2 of the picture, from latents with noise of up to 0.25 std (what the transformer
leaves over). Encoder: L2 of its mean to the map's latents, log-variance to -8.
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import picture_batch, random_levels, random_prompt, tiled_picture
from .latents import CHANNELS, LinearLatents

CONFIG = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# (pictures, half, steps), in this order: first words and shapes at any height, then tiles too
PARTS = (
    ("free", "decoder", 2000),
    ("free", "encoder", 500),
    ("fine", "decoder", 600),
    ("fine", "encoder", 250),
    ("coarse", "decoder", 500),
    ("coarse", "encoder", 250),
)
_BATCH, _RATE, _NOISE, _LOG_VARIANCE = 12, 2e-3, 0.25, -8.0


def build_vae(config: dict | None = None):
    """diffusers' AutoencoderKLFlux2, 32 to 64 channels wide, patchified 2 x 2 like FLUX.2's."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(**(config or CONFIG))


def vae_pictures(kind: str, part: str, step: int, size: int = _BATCH) -> Tensor:
    """The pictures of one step."""
    rng = random.Random(f"vae {part} {step}")
    prompts = [random_prompt(rng, i % 5 < 3, stated=kind != "free") for i in range(size)]
    if kind != "free":
        return torch.tensor(np.stack([tiled_picture(p, rng, kind) for p in prompts]))
    return torch.tensor(picture_batch(prompts, random_levels(size, rng)))


def _decoder_loss(vae, latents: LinearLatents, x: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = latents.tokens(x)
    strength = torch.rand(len(x), 1, 1, generator=generator) * _NOISE
    noisy = tokens + strength * torch.randn(tokens.shape, generator=generator)
    error = vae.decode(latents.denormalise(noisy), return_dict=False)[0] - x
    return error.abs().mean() + error.square().mean()


def _encoder_loss(vae, latents: LinearLatents, x: Tensor, step: int) -> Tensor:
    out = vae._encode(x)
    mean, log_variance = out[:, :CHANNELS], out[:, CHANNELS:]
    error = (mean - latents.latents(x)).square().mean()
    return error + 1e-4 * (log_variance - _LOG_VARIANCE).square().mean()


def _train_part(kind: str, part: str, steps: int, vae, latents: LinearLatents, work: Path) -> None:
    halves = {
        "decoder": (vae.decoder, vae.post_quant_conv),
        "encoder": (vae.encoder, vae.quant_conv),
    }
    parameters = [p for m in halves[part] for p in m.parameters()]
    loss_of = {"decoder": _decoder_loss, "encoder": _encoder_loss}[part]
    optimiser = torch.optim.AdamW(parameters, _RATE, betas=(0.9, 0.98), weight_decay=0, fused=True)
    path, step = work / f"vae_{kind}_{part}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    total, started = 0.0, time.time()
    while step < steps:
        rate = min(1, (step + 1) / 20, (steps - step) / (0.5 * steps))
        optimiser.param_groups[0]["lr"] = _RATE * max(rate, 0.01)
        loss = loss_of(vae, latents, vae_pictures(kind, part, step), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        vae.zero_grad(set_to_none=True)
        step, total = step + 1, total + loss.item()
        if step % 20 == 0:
            row = {"step": step, "seconds": round(time.time() - started, 1), "loss": total / 20}
            with (work / f"vae_{kind}_{part}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            total = 0.0
        if step % 100 == 0 or step == steps:
            state = {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def train_vae(work: Path) -> None:
    """Both halves, the decoder first; `vae_coarse_encoder.pt` then holds the whole VAE."""
    latents = LinearLatents.load(work / "latents.safetensors")
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.bn.running_mean.copy_(latents.mean)
        vae.bn.running_var.copy_(latents.var)
    for kind, part, steps in PARTS:
        _train_part(kind, part, steps, vae, latents, work)
