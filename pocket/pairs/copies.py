"""The pocket model's copies at every level, loaded once each, and what stands for one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from ...engine.one_copy import unconditional_from
from ...engine.transformer import PackTransformer, load_transformer
from ...quant.delta import DeltaOptions, make_delta
from ..table.models import Variant, in_memory, state_of, stored_bytes, write_model
from ..table.runs import add_to_digest
from ..table.systems import REFERENCE, unpacked, weights
from .settings import LEVELS, RANKS, lora

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"


class Copies:
    """Both copies of one model of the table, by level: models, bytes, digests of the weights."""

    def __init__(self, variant: Variant, work: Path) -> None:
        self.variant, self.work = variant, work
        self._known: dict[tuple[str, str], tuple[PackTransformer, int, str]] = {}

    def tensors(self, copy: str, level: str) -> dict[str, Tensor]:
        """Canonical names -> tensors as stored."""
        return weights(LEVELS[level], state_of(self.variant, copy), copy)

    def model(self, copy: str, level: str) -> PackTransformer:
        """One copy at a level, fp32 activations; GGUF, FP8 and NF4 weights decoded once."""
        return self._loaded(copy, level)[0]

    def pair(self, first: str, second: str) -> tuple[PackTransformer, PackTransformer]:
        """(conditional, unconditional); the second may be a LoRA's name."""
        conditional = self.model(CONDITIONAL, first)
        rank = _ranks().get(second)
        if rank is None:
            return conditional, self.model(UNCONDITIONAL, second)
        return conditional, unconditional_from(conditional, self._lora(rank))

    def nbytes(self, first: str, second: str) -> int:
        """Bytes that a pair's files hold."""
        rank = _ranks().get(second)
        held = self._loaded(CONDITIONAL, first)[1]
        if rank is not None:
            return held + self._lora(rank).stat().st_size
        return held + self._loaded(UNCONDITIONAL, second)[1]

    def digest(self, first: str, second: str) -> str:
        """A name for the weights of a pair: SHA-256 over every byte of them."""
        rank = _ranks().get(second)
        parts = [self._loaded(CONDITIONAL, first)[2]]
        if rank is None:
            parts.append(self._loaded(UNCONDITIONAL, second)[2])
        else:
            parts.append(hashlib.sha256(self._lora(rank).read_bytes()).hexdigest())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _loaded(self, copy: str, level: str) -> tuple[PackTransformer, int, str]:
        if (copy, level) not in self._known:
            stored = self.tensors(copy, level)
            model = self.load(copy, unpacked(stored, LEVELS[level].compute))
            self._known[copy, level] = (model, stored_bytes(stored), _digest(stored))
        return self._known[copy, level]

    def load(self, copy: str, tensors: Mapping[str, Tensor]) -> PackTransformer:
        """The engine's model of one copy's tensors."""
        return load_transformer(in_memory(self.variant, dict(tensors)), copy, device="cpu").eval()

    def _lora(self, rank: int) -> Path:
        out = self.work / "models" / f"{self.variant.slug}-delta-{rank}.safetensors"
        if not out.is_file():
            files = write_model(self.variant, self.work / "models")
            make_delta(files[CONDITIONAL], files[UNCONDITIONAL], out, DeltaOptions(rank))
        return out


def exact(copies: Copies) -> tuple[PackTransformer, PackTransformer]:
    """Both copies as they were trained."""
    return copies.pair(REFERENCE, REFERENCE)


@cache
def _ranks() -> dict[str, int]:
    return {lora(rank): rank for rank in RANKS}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        add_to_digest(digest, tensor)
    return digest.hexdigest()
