"""Captions by the language model of the encoder that is loaded."""

from __future__ import annotations

import comfy.sd
from torch import Tensor

from ..captions.tokens import MAX_TOKENS, TokenSampler
from .encoder_model import language_model


def write(
    clip: comfy.sd.CLIP,
    asked: str,
    seed: int,
    max_tokens: int = MAX_TOKENS,
    picture: Tensor | None = None,
    *,
    constrained: bool = True,
) -> str:
    """What the encoder answers to ``asked``, a conversation with its turns, as it is written.

    picture: [1, H, W, 3] in 0 to 1, where the conversation holds a place for one. The host shows
    the progress and ends it when the run is cancelled. Raises OpError for an encoder of another
    loader, CheckpointError for one without the parts for it.
    """
    model = language_model(clip)
    model.writer.check(picture=picture is not None)
    words = clip.tokenizer.words
    constraint = model.writer.constraint(words) if constrained else None
    tokens = clip.tokenize(asked, image=picture, thinking=False)
    with model.drawing(TokenSampler(seed, constraint)):
        written = clip.generate(tokens, do_sample=True, max_length=max_tokens, seed=seed)
    return clip.decode(written)


def memory(clip: comfy.sd.CLIP) -> str:
    """Which files the encoder writes with, and the memory that they take, for people."""
    return language_model(clip).writer.said()
