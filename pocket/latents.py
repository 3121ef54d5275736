"""The fixed linear map that stands in for the VAE's encoder while the transformer trains.

PCA of 8 x 8 x 3 pixel blocks to 32 channels, half-whitened and rotated; then the VAE's own last
step, 2 x 2 positions to one token of 128 channels, normalised by the `bn` statistics.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import picture_batch, random_levels, random_prompt

CHANNELS = 32
BN_EPS = 1e-4
_SEED = 3


def blocks(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H/8, W/8, 192]."""
    b, c, h, w = pictures.shape
    split = pictures.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(b, h // 8, w // 8, c * 64)


def pack(latents: Tensor) -> Tensor:
    """[B, 32, h, w] -> tokens [B, h*w/4, 128], channels in the order (pi, pj, c)."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return split.reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack` for a grid of rows x columns tokens."""
    b = tokens.shape[0]
    split = tokens.reshape(b, rows, columns, 2, 2, CHANNELS).permute(0, 5, 1, 3, 2, 4)
    return split.reshape(b, CHANNELS, rows * 2, columns * 2)


@dataclass
class LinearLatents:
    """z = (blocks - centre) @ analysis; tokens = (pack(z) - mean) / std."""

    analysis: Tensor  # [192, 32]
    synthesis: Tensor  # [32, 192]
    centre: Tensor  # [192]
    mean: Tensor  # [128], order (pi, pj, c)
    var: Tensor  # [128]

    @property
    def std(self) -> Tensor:
        return (self.var + BN_EPS).sqrt()

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> raw latents [B, 32, H/8, W/8]."""
        return ((blocks(pictures) - self.centre) @ self.analysis).permute(0, 3, 1, 2)

    def tokens(self, pictures: Tensor) -> Tensor:
        """Pictures -> normalised tokens [B, N, 128]."""
        return (pack(self.latents(pictures)) - self.mean) / self.std

    def denormalise(self, tokens: Tensor, rows: int = 4, columns: int = 8) -> Tensor:
        """Normalised tokens -> raw latents [B, 32, h, w]."""
        return unpack(tokens * self.std + self.mean, rows, columns)

    def picture(self, tokens: Tensor, rows: int = 4, columns: int = 8) -> Tensor:
        """Normalised tokens -> picture by the linear inverse (training-time checks only)."""
        b = tokens.shape[0]
        flat = self.denormalise(tokens, rows, columns).permute(0, 2, 3, 1) @ self.synthesis
        split = (flat + self.centre).reshape(b, rows * 2, columns * 2, 3, 8, 8)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(b, 3, rows * 16, columns * 16)

    def save(self, path: Path) -> None:
        save_file({k: v.contiguous() for k, v in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> "LinearLatents":
        return cls(**load_file(path))


def fit_latents(pictures: int = 3000) -> LinearLatents:
    """Fits the map on random pictures; eigenvalues enter with the power -1/4 (half-whitened)."""
    rng = random.Random(11)
    prompts = [random_prompt(rng, i % 5 < 3) for i in range(pictures)]
    x = torch.tensor(picture_batch(prompts, random_levels(pictures, rng)))
    flat = blocks(x).reshape(-1, 192)
    centre = flat.mean(0)
    flat = flat - centre
    values, vectors = torch.linalg.eigh((flat.T @ flat / len(flat)).double())
    values, vectors = values.flip(0)[:CHANNELS].float(), vectors.flip(1)[:, :CHANNELS].float()
    rotation = torch.linalg.qr(
        torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(_SEED))
    )[0]
    analysis = (vectors * values.pow(-0.25)) @ rotation
    analysis = analysis / (flat @ analysis).std()
    linear = LinearLatents(
        analysis, torch.linalg.pinv(analysis), centre, torch.zeros(128), torch.ones(128)
    )
    tokens = pack(linear.latents(x)).reshape(-1, 128)
    linear.mean, linear.var = tokens.mean(0), tokens.var(0)
    return linear
