"""A small random Ideogram 4 as files, written with the safetensors library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "in_channels": 128,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "intermediate_size": 768,
    "adaln_dim": 256,
    "llm_features_dim": 832,
    "rope_theta": 10000,
    "mrope_section": [24, 20, 20],
    "norm_eps": 1e-5,
}

BLOCK_LINEARS = (
    "attention.qkv",
    "attention.o",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "adaln_modulation",
)
STEM_LINEARS = (
    "input_proj",
    "llm_cond_proj",
    "t_embedding.mlp_in",
    "t_embedding.mlp_out",
    "adaln_proj",
    "final_layer.linear",
    "final_layer.adaln_modulation",
)


def linear_names(layers: int = 2) -> list[str]:
    """Module names of the block linears."""
    return [f"layers.{i}.{name}" for i in range(layers) for name in BLOCK_LINEARS]


def shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names and shapes of the small model."""
    hidden, ffn, adaln, features, channels = 256, 768, 256, 832, 128
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, n: int, k: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (n, k)
        if bias:
            found[f"{name}.bias"] = (n,)

    linear("input_proj", hidden, channels)
    found["llm_cond_norm.weight"] = (features,)
    linear("llm_cond_proj", hidden, features)
    linear("t_embedding.mlp_in", hidden, hidden)
    linear("t_embedding.mlp_out", hidden, hidden)
    linear("adaln_proj", adaln, hidden)
    found["embed_image_indicator.weight"] = (2, hidden)
    for i in range(layers):
        layer = f"layers.{i}"
        linear(f"{layer}.attention.qkv", 3 * hidden, hidden, bias=False)
        linear(f"{layer}.attention.o", hidden, hidden, bias=False)
        found[f"{layer}.attention.norm_q.weight"] = (128,)
        found[f"{layer}.attention.norm_k.weight"] = (128,)
        linear(f"{layer}.feed_forward.w1", ffn, hidden, bias=False)
        linear(f"{layer}.feed_forward.w2", hidden, ffn, bias=False)
        linear(f"{layer}.feed_forward.w3", ffn, hidden, bias=False)
        linear(f"{layer}.adaln_modulation", 4 * hidden, adaln)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            found[f"{layer}.{norm}.weight"] = (hidden,)
    linear("final_layer.linear", channels, hidden)
    linear("final_layer.adaln_modulation", hidden, adaln)
    return found


def weights(seed: int = 0, layers: int = 2) -> dict[str, Tensor]:
    """Random bf16 weights: gaussian linears, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(layers).items():
        values = torch.randn(shape, generator=generator)
        made[name] = (0.02 * values if len(shape) == 2 else 1 + 0.1 * values).bfloat16()
    return made


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    copy: str = "conditional",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A bf16 file as Comfy-Org's are marked; ``metadata`` is added."""
    short = {"conditional": "ideogram4_cond", "unconditional": "ideogram4_uncond"}[copy]
    note = {"format": "pt", "model_type": short, "config": json.dumps(CONFIG), **(metadata or {})}
    save_file(dict(tensors), path, metadata=note)
    return path
