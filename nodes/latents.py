"""Latents of Ideogram 4 as the host holds them: [B, 128, H / 16, W / 16]."""

from __future__ import annotations

import comfy.model_management as management
import torch
from torch import Tensor

from ..errors import OpError

TOKEN_PIXELS = 16
LATENT_CHANNELS = 128


def empty_latent(width: int, height: int, batch: int = 1) -> Tensor:
    """Zeros for pictures of ``width`` x ``height`` pixels, on the host's intermediate device."""
    size = (batch, LATENT_CHANNELS, height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    return torch.zeros(size, device=management.intermediate_device())


def check_latent(samples: Tensor) -> None:
    """OpError for latents of another VAE's kind; the host has made empty ones fit by now."""
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise OpError(
            "this latent comes from another VAE",
            found=list(samples.shape),
            needed=f"[batch, {LATENT_CHANNELS}, height / {TOKEN_PIXELS}, width / {TOKEN_PIXELS}]",
            hint="Encode the picture with flux2-vae.safetensors.",
        )
