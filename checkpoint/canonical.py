"""Canonical names of Ideogram 4's tensors and their shapes: the original release's, qkv fused."""

from __future__ import annotations

from .config import ModelConfig

# The unconditional copy never uses these, and some files leave them out of it.
TEXT_ONLY = ("llm_cond_norm.weight", "llm_cond_proj.weight", "llm_cond_proj.bias")

_NOT_LINEAR = ("norm", "embed_image_indicator")


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of one copy, in the order in which the model uses them.

    Weights of linears are [out, in]. 211 of the real model's are linears: 7 in the stem, 6 in each
    of 34 layers.
    """
    hidden, adaln = config.hidden_size, config.adaln_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_proj.weight": (hidden, config.in_channels),
        "input_proj.bias": (hidden,),
        "llm_cond_norm.weight": (config.llm_features_dim,),
        "llm_cond_proj.weight": (hidden, config.llm_features_dim),
        "llm_cond_proj.bias": (hidden,),
        "t_embedding.mlp_in.weight": (hidden, hidden),
        "t_embedding.mlp_in.bias": (hidden,),
        "t_embedding.mlp_out.weight": (hidden, hidden),
        "t_embedding.mlp_out.bias": (hidden,),
        "adaln_proj.weight": (adaln, hidden),
        "adaln_proj.bias": (adaln,),
        "embed_image_indicator.weight": (2, hidden),
    }
    for layer in range(config.num_layers):
        shapes |= _layer_shapes(f"layers.{layer}", config)
    return shapes | {
        "final_layer.adaln_modulation.weight": (hidden, adaln),
        "final_layer.adaln_modulation.bias": (hidden,),
        "final_layer.linear.weight": (config.in_channels, hidden),
        "final_layer.linear.bias": (config.in_channels,),
    }


def _layer_shapes(layer: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        f"{layer}.adaln_modulation.weight": (4 * hidden, config.adaln_dim),
        f"{layer}.adaln_modulation.bias": (4 * hidden,),
        f"{layer}.attention_norm1.weight": (hidden,),
        f"{layer}.attention.qkv.weight": (3 * hidden, hidden),
        f"{layer}.attention.norm_q.weight": (config.attention_head_dim,),
        f"{layer}.attention.norm_k.weight": (config.attention_head_dim,),
        f"{layer}.attention.o.weight": (hidden, hidden),
        f"{layer}.attention_norm2.weight": (hidden,),
        f"{layer}.ffn_norm1.weight": (hidden,),
        f"{layer}.feed_forward.w1.weight": (inner, hidden),
        f"{layer}.feed_forward.w3.weight": (inner, hidden),
        f"{layer}.feed_forward.w2.weight": (hidden, inner),
        f"{layer}.ffn_norm2.weight": (hidden,),
    }


def is_linear(name: str) -> bool:
    """Whether the tensor ``name`` is the weight of a linear layer."""
    return name.endswith(".weight") and not any(part in name for part in _NOT_LINEAR)
