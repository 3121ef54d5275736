"""What the engine's tests compare with: diffusers' unmodified forward, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ideogram4_quant.tests.tiny_model import CONFIG, canonical_state, packed_inputs


@dataclass
class Stored:
    """A checkpoint in memory: canonical names to tensors."""

    state: dict[str, Tensor]
    model_config: dict
    copies: tuple[str, ...] = ("conditional",)
    paths: tuple[str, ...] = ("memory",)

    @property
    def config(self) -> Stored:
        return self

    def to_dict(self) -> dict:
        return dict(self.model_config)

    def stream(self, copy, *, dtype=torch.bfloat16, progress=None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.state.items():
            yield name, tensor.to(dtype=dtype)


def stored(model: torch.nn.Module, copy: str = "conditional", config: dict = CONFIG) -> Stored:
    """diffusers' model as a checkpoint."""
    return Stored(canonical_state(model), config, (copy,))


@torch.no_grad()
def reference_velocity(
    model: torch.nn.Module,
    x: Tensor,
    time: float,
    features: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """The velocity at the image tokens by diffusers' forward; its dtype is that of ``x``."""
    inputs = packed_inputs(x, features, rows, columns)
    times = torch.full((len(x),), time, dtype=x.dtype)
    out = model(timestep=times, return_dict=False, **inputs)[0]
    return out[:, out.shape[1] - x.shape[1] :]
