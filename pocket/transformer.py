"""The two copies' shape, their packed inputs, and the reference sampler."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .encoder import FEATURES

CONFIG = {
    "in_channels": 128,
    "num_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "intermediate_size": 768,
    "adaln_dim": 256,
    "llm_features_dim": FEATURES,
    "rope_theta": 10000,
    "mrope_section": (24, 20, 20),
    "norm_eps": 1e-5,
}
TEXT, IMAGE, PADDING = 3, 2, -1
IMAGE_OFFSET = 65536
DEFAULT_GUIDANCE = (7.0,) * 18 + (3.0,) * 2
DEFAULT_MU, DEFAULT_STD = 0.0, 1.75


def build_transformer(config: dict | None = None):
    """diffusers' Ideogram4Transformer2DModel in the pocket size."""
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(**(config or CONFIG))


def layout(
    lengths: list[int], text: int, rows: int = 4, columns: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """position_ids [B, L, 3], segment_ids [B, L], indicator [B, L] of [left pad][text][image]."""
    b, n = len(lengths), rows * columns
    grid = torch.stack(
        [torch.zeros(n), torch.arange(n) // columns, torch.arange(n) % columns], 1
    ).long()
    positions = torch.zeros(b, text + n, 3, dtype=torch.long)
    segments = torch.full((b, text + n), PADDING)
    indicator = torch.zeros(b, text + n, dtype=torch.long)
    positions[:, text:] = grid + IMAGE_OFFSET
    indicator[:, text:] = IMAGE
    for i, length in enumerate(lengths):
        positions[i, text - length : text] = torch.arange(length)[:, None]
        indicator[i, text - length : text] = TEXT
        segments[i, text - length :] = 1
    return positions, segments, indicator


def velocity(
    model, x: Tensor, t: Tensor, features: Tensor | None = None, lengths: list[int] | None = None
) -> Tensor:
    """v(x, t) [B, 32, 128]; with features [B, L, 832] conditional, without them unconditional."""
    b, n, c = x.shape
    text = 0 if features is None else features.shape[1]
    if features is None:
        encoder, hidden = x.new_zeros(b, n, FEATURES), x
    else:
        encoder = torch.cat([features.to(x), x.new_zeros(b, n, FEATURES)], 1)
        hidden = torch.cat([x.new_zeros(b, text, c), x], 1)
    ids = layout(lengths or [0] * b, text)
    return model(hidden, t, encoder, *ids, return_dict=False)[0][:, text:]


def sigmas(
    steps: int, mu: float = DEFAULT_MU, std: float = DEFAULT_STD, pixels: int = 128 * 64
) -> Tensor:
    """sigma_i = sigmoid(m + std * ndtri(1 - i/steps)), m = mu + ln(pixels / 512^2) / 2; then 0."""
    mean = mu + 0.5 * math.log(pixels / 512**2)
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    t = 1 - torch.special.expit(mean + std * torch.special.ndtri(u))
    t = t.clamp(1 / (1 + math.exp(9.0)), 1 / (1 + math.exp(-7.5)))
    return torch.cat([(1 - t).flip(0)[:-1].float(), torch.zeros(1)])


@torch.no_grad()
def sample(
    cond,
    uncond,
    features: Tensor,
    lengths: list[int],
    noise: Tensor,
    guidance: Sequence[float] = DEFAULT_GUIDANCE,
    schedule: Tensor | None = None,
) -> Tensor:
    """Euler along v = g * v_cond + (1 - g) * v_uncond, one g a step, in fp32."""
    schedule = sigmas(len(guidance)) if schedule is None else schedule
    x = noise.clone()
    for g, here, there in zip(guidance, schedule[:-1], schedule[1:], strict=True):
        t = (1 - here).expand(len(x))
        v = velocity(cond, x, t, features, lengths).float()
        if g != 1:
            v = g * v + (1 - g) * velocity(uncond, x, t).float()
        x = x + (here - there) * v
    return x
