"""How the next token of a caption is drawn, as transformers draws it for diffusers' pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .schema import written_schema

logger = logging.getLogger(__name__)
MAX_TOKENS = 1024  # diffusers' bound for one caption
TOP_K = 50  # transformers' own where nothing else is said
FREE = (
    "outlines is not installed, so nothing keeps the encoder to the caption's schema and what it "
    "writes is mended afterwards: pip install outlines"
)


class Constraint(Protocol):
    """What may follow. One serves one caption."""

    def mask(self, logits: Tensor) -> Tensor:
        """logits [1, V] with what may not follow at -inf."""

    def advance(self, token: int) -> None:
        """``token`` was drawn."""


class TokenSampler:
    """logits [1, V] -> a token [1, 1] int64: temperature 1, the 50 likeliest, by ``seed``.

    Draws the tokens that ``transformers.generate`` draws for diffusers' `generate_captions` with a
    ``torch.Generator().manual_seed(seed)``, on the same kind of device.
    """

    def __init__(self, seed: int, constraint: Constraint | None = None) -> None:
        self._seed = _drawn_seed(seed)
        self._generator: torch.Generator | None = None
        self._constraint = constraint

    def __call__(self, logits: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        scores = logits.float()
        if self._constraint is not None:
            scores = self._constraint.mask(scores)
        least = torch.topk(scores, min(TOP_K, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
        token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        if self._constraint is not None:
            self._constraint.advance(int(token))
        return token


def _drawn_seed(seed: int) -> int:
    """The seed that diffusers draws from its generator for the sampling of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, 2**63 - 1, (1,), generator=generator))


def constraints(tokenizer: Any) -> Callable[[], Constraint] | None:
    """What makes a constraint to the schema for each caption; None, said once, without outlines.

    ``tokenizer``: transformers' own. Takes seconds for Qwen's 151,936 tokens, so keep the result.
    """
    try:
        from outlines_core import Guide, Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        logger.warning(FREE)
        return None
    ids: dict[str, list[int]] = {}
    for token, number in tokenizer.get_vocab().items():
        ids.setdefault(tokenizer.convert_tokens_to_string([token]), []).append(number)
    ids.pop(tokenizer.convert_tokens_to_string([tokenizer.eos_token]), None)
    regex = build_regex_from_schema(json.dumps(written_schema()))
    index = Index(regex, Vocabulary(tokenizer.eos_token_id, ids))
    return lambda: _Guided(Guide(index))


class _Guided:
    """outlines' guide through the schema."""

    def __init__(self, guide: Any) -> None:
        self._guide = guide

    def mask(self, logits: Tensor) -> Tensor:
        words = torch.zeros((logits.shape[-1] + 31) // 32, dtype=torch.int32)
        self._guide.write_mask_into(words.data_ptr(), words.numel(), words.element_size())
        bits = (words[:, None] >> torch.arange(32)) & 1  # bit i of a word: its i-th token
        allowed = bits.flatten()[: logits.shape[-1]].bool().to(logits.device)
        return logits.masked_fill(~allowed, -torch.inf)

    def advance(self, token: int) -> None:
        if not self._guide.is_finished():
            self._guide.advance(token, return_tokens=False)
