"""The dimensions of a text encoder: stated beside its weights or in them, or read off shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError
from ..gguf_loader import ArrayRef
from .entries import Entry
from .tensor_files import TensorFiles, read_json

# Qwen3-VL's, where neither a file nor a shape tells.
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "mrope_section": [24, 20, 20],
}
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 10

# GGUF key without its architecture -> ours
_GGUF_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_LAYER = re.compile(r"layers\.(\d+)\.")


def encoder_config(tensor_files: TensorFiles, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Names and values of transformers' Qwen3VLTextConfig, with ``rope_theta`` and
    ``mrope_section`` by themselves as well as in ``rope_parameters``.

    Sizes come from the tensors; a statement that contradicts them raises CorruptFileError, as do
    unusable values.
    """
    stated = _from_json(tensor_files) or _from_gguf(tensor_files)
    config = {key: value for key, value in stated.items() if value is not None}
    for key, size in _from_shapes(entries, config.get("head_dim")).items():
        if config.setdefault(key, size) != size:
            raise CorruptFileError(
                f"the stated {key} is not that of the tensors",
                file=tensor_files.path,
                found=size,
                needed=config[key],
                hint="The config belongs to another model, or tensors are missing.",
            )
    config = DEFAULTS | config
    _check(config, tensor_files.path)
    rope = {"rope_type": "default", "mrope_interleaved": True}
    rope |= {key: config[key] for key in ("rope_theta", "mrope_section")}
    return config | {"rope_parameters": rope}


def _from_shapes(entries: Mapping[str, Entry], head_dim: Any) -> dict[str, int]:
    def rows(name: str) -> int | None:
        shape = entries[name].shape if name in entries else ()
        return shape[0] if shape else None

    layers = {int(match[1]) for match in map(_LAYER.match, entries) if match}
    attention = "layers.0.self_attn"
    if not _is_size(head_dim):
        head_dim = DEFAULTS["head_dim"]
    head_dim = rows(f"{attention}.q_norm.weight") or head_dim
    queries, keys = rows(f"{attention}.q_proj.weight"), rows(f"{attention}.k_proj.weight")
    found = {
        "hidden_size": rows("layers.0.input_layernorm.weight"),
        "num_hidden_layers": max(layers, default=0) + 1,
        "head_dim": head_dim,
        "num_attention_heads": queries // head_dim if queries else None,
        "num_key_value_heads": keys // head_dim if keys else None,
        "intermediate_size": rows("layers.0.mlp.up_proj.weight"),
        "vocab_size": rows("embed_tokens.weight"),
    }
    return {key: size for key, size in found.items() if size is not None}


def _from_json(tensor_files: TensorFiles) -> dict[str, Any]:
    """From ``config.json`` beside the weights, of the text model alone or of the whole of it."""
    path = tensor_files.path.parent / "config.json"
    if tensor_files.kind != "safetensors" or not path.is_file():
        return {}
    values = read_json(path)
    if isinstance(values.get("text_config"), dict):
        values = values["text_config"]
    if not str(values.get("model_type")).startswith("qwen3"):
        return {}  # of something else in the same folder
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    found = {key: values.get(key) for key in (*_SIZES, "rms_norm_eps")}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    return found | {"rope_theta": theta, "mrope_section": rope.get("mrope_section")}


def _from_gguf(tensor_files: TensorFiles) -> dict[str, Any]:
    arch = tensor_files.metadata.get("general.architecture")
    if tensor_files.kind != "gguf" or not isinstance(arch, str):
        return {}
    found = {ours: tensor_files.metadata.get(f"{arch}.{key}") for key, ours in _GGUF_KEYS.items()}
    key = f"{arch}.rope.dimension_sections"
    sections = tensor_files.metadata.get(key)
    if isinstance(sections, ArrayRef) and 3 <= sections.count <= 4:
        # llama.cpp writes four, the last one 0
        found["mrope_section"] = tensor_files.array(key)[:3]
    return found


def _check(config: Mapping[str, Any], path: Path) -> None:
    sections = config["mrope_section"]
    usable = {
        **{key: _is_size(config.get(key)) for key in _SIZES},
        "num_hidden_layers": _is_size(config.get("num_hidden_layers"), _MAX_LAYERS),
        "rms_norm_eps": isinstance(config["rms_norm_eps"], float)
        and 0 < config["rms_norm_eps"] < 1,
        "rope_theta": isinstance(config["rope_theta"], int | float)
        and 1 < config["rope_theta"] < 1e12,
        "mrope_section": isinstance(sections, list)
        and len(sections) == 3
        and all(map(_is_size, sections)),
    }
    for key, fine in usable.items():
        if not fine:
            raise CorruptFileError(
                f"unusable {key} in the text encoder's config",
                file=path,
                found=repr(config.get(key))[:80],
            )


def _is_size(value: Any, limit: int = _MAX_SIZE) -> bool:
    return type(value) is int and 0 < value <= limit
