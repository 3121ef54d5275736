"""Latents of Ideogram 4 as the host holds them: [B, 128, H / 16, W / 16]."""

from __future__ import annotations

import comfy.model_management as management
import torch
from torch import Tensor

TOKEN_PIXELS = 16
LATENT_CHANNELS = 128


def empty_latent(width: int, height: int, batch: int = 1) -> Tensor:
    """Zeros for pictures of ``width`` x ``height`` pixels, on the host's intermediate device."""
    size = (batch, LATENT_CHANNELS, height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    return torch.zeros(size, device=management.intermediate_device())
