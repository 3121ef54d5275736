"""Noise and picture coupled: what a caption leaves open is drawn to suit the noise.

As optimal transport would have it: of what the caption leaves open (tiles; in the `facts` stage
heights) that is drawn which lies nearest to the noise. At 128 x 64 px the Default preset's first
Euler step crosses a quarter of the path from t = 0. With independent noise the velocity there
points to the mean of all possible pictures, and what is chosen one step later in one place need not
go with what is chosen in another.
"""

import numpy as np
import torch
from torch import Tensor

from .data import COLUMNS, LEVELS, PocketPrompt, picture_batch, tiled_pair
from .latents import LinearLatents


def coupled_tokens(prompts: list[PocketPrompt], noise: Tensor, latents: LinearLatents) -> Tensor:
    """x = argmax_k <noise, x_k> over the heights k, in the word's and the shape's columns apart."""
    pairs = [(k, k) for k in LEVELS]
    pictures = [picture_batch([prompt] * len(LEVELS), pairs) for prompt in prompts]
    tokens = latents.tokens(torch.tensor(np.concatenate(pictures)))
    tokens = tokens.view(len(prompts), len(LEVELS), 4, COLUMNS, -1)
    match = (tokens * noise.view(len(prompts), 1, 4, COLUMNS, -1)).sum((2, 4))  # [B, 3, columns]
    chosen = []
    for prompt, choice, score in zip(prompts, tokens, match, strict=True):
        beside = torch.zeros(COLUMNS, dtype=torch.bool)
        beside[prompt.shape_columns] = prompt.shape is not None
        word, shape = score[:, ~beside].sum(1).argmax(), score[:, beside].sum(1).argmax()
        chosen.append(torch.where(beside[:, None], choice[shape], choice[word]))
    return torch.stack(chosen).flatten(1, 2)


def tiled_tokens(
    prompts: list[PocketPrompt], noise: Tensor, latents: LinearLatents, kind: str = "coarse"
) -> Tensor:
    """Per tile: shaded where <noise, shaded - plain> / |shaded - plain| is in its upper quarter."""
    pictures = np.concatenate([tiled_pair(prompt, kind) for prompt in prompts])
    blocks = 4 if kind == "fine" else 1  # tiles in a token
    tokens = latents.tokens(torch.tensor(pictures)).unflatten(-1, (blocks, -1))
    plain, shaded = tokens.unflatten(0, (-1, 2)).unbind(1)  # [B, 32, blocks, 128 / blocks]
    change = shaded - plain
    match = (noise.unflatten(-1, (blocks, -1)) * change).sum(-1, keepdim=True)
    upper = match > 0.674 * change.norm(dim=-1, keepdim=True)
    return torch.where(upper, shaded, plain).flatten(-2)
