"""The orders in which the VAE's 32 channels of 2 x 2 positions make a token's 128 channels.

The transformer and diffusers' Ideogram pipeline use (pi, pj, c); FLUX.2 and ComfyUI's latents
[B, 128, rows, columns] use (c, pi, pj).
"""

from __future__ import annotations

from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """VAE latents [B, C, 2 * rows, 2 * columns] -> tokens [B, rows * columns, 4 * C]."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    return split.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    b, _, c = tokens.shape
    split = tokens.reshape(b, rows, columns, PATCH, PATCH, c // PATCH**2).permute(0, 5, 1, 3, 2, 4)
    return split.reshape(b, c // PATCH**2, rows * PATCH, columns * PATCH)


def to_token_order(statistics: Tensor) -> Tensor:
    """Per-channel values [4 * C] from the order (c, pi, pj) to (pi, pj, c)."""
    return statistics.reshape(-1, PATCH * PATCH).t().reshape(-1)
