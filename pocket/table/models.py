"""The models of the table: the pocket model as trained, and with each disease."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint import write_safetensors
from ...checkpoint.config import ModelConfig
from .. import diseases
from ..export import load_encoder
from ..paths import WEIGHTS, dit_path
from ..transformer import CONFIG

COPIES = {"conditional": "cond", "unconditional": "uncond"}


@dataclass(frozen=True)
class Variant:
    """One model of the table: a name, and the disease with its strength (None: as trained)."""

    name: str
    disease: diseases.Disease | None = None
    strength: float = 0.0
    stress: bool = False

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return self.name.replace(", ", "-")

    @property
    def config(self) -> dict:
        return diseases.sick_config(self.disease) if self.disease else dict(CONFIG)


VARIANTS = (
    Variant("clean"),
    Variant("channels", "channels", diseases.MODERATE),
    Variant("tokens", "tokens", diseases.MODERATE),
    Variant("channels, stress", "channels", diseases.STRESS["channels"], stress=True),
    Variant("tokens, stress", "tokens", diseases.STRESS["tokens"], stress=True),
)


@lru_cache(maxsize=2 * len(VARIANTS))
def state_of(variant: Variant, copy: str) -> dict[str, Tensor]:
    """Canonical names -> bf16 tensors of one copy."""
    state = load_file(dit_path(COPIES[copy]))
    if variant.disease is None:
        return state
    encoder = load_encoder(WEIGHTS) if copy == "conditional" else None
    return diseases.infect(state, variant.disease, variant.strength, encoder=encoder)


def write_model(variant: Variant, folder: Path) -> dict[str, Path]:
    """Both copies as bf16 files with their config, as a trainer would leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for copy, short in COPIES.items():
        config = {"_class_name": "Ideogram4Transformer2DModel", **variant.config}
        metadata = {"model_type": f"ideogram4_{short}", "config": json.dumps(config)}
        files[copy] = folder / f"{variant.slug}-{copy}.safetensors"
        # safetensors' own writer orders metadata by chance; a calibration knows its model by hash
        write_safetensors(files[copy], state_of(variant, copy), metadata, overwrite=True)
    return files


@dataclass(frozen=True)
class MemoryCheckpoint:
    """What the engine asks of an opened checkpoint, over tensors that lie in memory."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    paths: tuple[Path, ...] = (Path("in memory"),)

    def stream(
        self,
        copy: str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """``(canonical name, tensor)`` one by one."""
        yield from self.tensors.items()


def in_memory(variant: Variant, tensors: dict[str, Tensor]) -> MemoryCheckpoint:
    """One copy's tensors with the config of its variant."""
    config = ModelConfig(**variant.config)
    return MemoryCheckpoint(replace(config, mrope_section=tuple(config.mrope_section)), tensors)


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes as they would lie in a file: codes, scales and smoothing vectors, the rest in bf16."""
    total = 0
    for tensor in tensors.values():
        if isinstance(tensor, QuantizedTensor):
            parts = tensor.layout_cls.get_plain_tensors(tensor)
            total += sum(part.nbytes for part in parts)
        else:
            total += tensor.nbytes
    return total
