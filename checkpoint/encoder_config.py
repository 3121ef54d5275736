"""The dimensions of a text encoder: stated beside its weights or in them, or read off shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, NotIdeogram4Error, printable
from ..gguf_loader import ArrayRef
from .entries import Entry
from .tensor_files import TensorFiles, read_json

logger = logging.getLogger(__name__)

_KIND = "qwen3_vl"  # of the whole model; qwen3_vl_text of the part
_ARCHITECTURES = ("qwen3vl", "none", "")
_VISION = re.compile(r"(?:^|\.)visual\.")

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


def encoder_config(
    tensor_files: TensorFiles, entries: Mapping[str, Entry], beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Names and values of transformers' Qwen3VLTextConfig, with ``rope_theta`` and
    ``mrope_section`` by themselves as well as in ``rope_parameters``.

    ``beside``: what ``config_beside`` found. Sizes come from the tensors; a statement that
    contradicts them raises CorruptFileError, as do unusable values.
    """
    stated = _from_json(beside) if beside is not None else _from_gguf(tensor_files)
    config = {key: value for key, value in stated.items() if value is not None}
    for key, size in sizes_of(entries, config.get("head_dim")).items():
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


def config_beside(tensor_files: TensorFiles, entries: Mapping[str, Entry]) -> dict[str, Any] | None:
    """``config.json`` beside safetensors files, of the text model alone or the whole of Qwen3-VL.

    None where there is none or, said in the log, where it is another model's: its kind or its
    width says so. Raises NotIdeogram4Error if such a config is the model's own, as in a folder of
    Hugging Face's: then the weights are the other model's too.
    """
    path = tensor_files.path.parent / "config.json"
    if tensor_files.kind != "safetensors" or not path.is_file():
        return None
    whole = read_json(path)
    values = whole["text_config"] if isinstance(whole.get("text_config"), dict) else whole
    if "model_type" not in values:
        return None  # of something else in the same folder
    kind = str(values["model_type"])
    problem = "" if kind.startswith(_KIND) else f"model_type {kind}"
    if not problem:
        problem = _other_width(sizes_of(entries, values.get("head_dim")), values)
    if not problem:
        return {**whole, **values}
    if _own_config(tensor_files):
        raise NotIdeogram4Error(
            "this is no Qwen3-VL text encoder, says its config.json",
            file=path,
            found=problem,
            needed=f"{_KIND}, of the size of the tensors",
            hint="Pick a file of Qwen3-VL-8B.",
        )
    logger.warning(
        "%s: is of another model (%s), so it is not used for %s; the usual values of Qwen3-VL are",
        path,
        printable(problem),
        tensor_files.path.name,
    )
    return None


def _own_config(tensor_files: TensorFiles) -> bool:
    """Whether the config beside a file must be its own: the file has transformers' name, and no
    vision part that tells it from Qwen3."""
    name = tensor_files.path.name
    usual = name == "model.safetensors" or name.startswith(("model-0", "model.safetensors."))
    return usual and not any(_VISION.search(key) for key in tensor_files.tensors)


def _other_width(sizes: Mapping[str, int], values: Mapping[str, Any]) -> str:
    """The sizes of a layer that a config states differently, for people; empty if none."""
    differing = [
        f"{key} {values[key]} where the tensors have {sizes[key]}"
        for key in ("hidden_size", "intermediate_size")
        if _is_size(values.get(key)) and key in sizes and values[key] != sizes[key]
    ]
    return ", ".join(differing)


def check_architecture(tensor_files: TensorFiles) -> None:
    """NotIdeogram4Error for a GGUF file whose header names another language model.

    Early converters called the text part of Qwen3-VL ``qwen3``, as Qwen3 itself: its rotary base
    tells them apart. A file that does not state it is taken, said in the log.
    """
    arch = tensor_files.metadata.get("general.architecture")
    if tensor_files.kind != "gguf" or not isinstance(arch, str) or arch in _ARCHITECTURES:
        return
    base = tensor_files.metadata.get(f"{arch}.rope.freq_base")
    sections = tensor_files.metadata.get(f"{arch}.rope.dimension_sections")
    if arch == "qwen3" and (isinstance(sections, ArrayRef) or base == DEFAULTS["rope_theta"]):
        return
    if arch == "qwen3" and base is None:
        logger.warning(
            "%s: its header says qwen3, not qwen3vl, and nothing in it tells the two apart; if it "
            "is the plain Qwen3, pictures will not follow the prompt",
            tensor_files.path,
        )
        return
    said = f"general.architecture {printable(arch)}"
    raise NotIdeogram4Error(
        "this is no Qwen3-VL text encoder, says its header",
        file=tensor_files.path,
        found=said if base is None else f"{said}, rope.freq_base {base}",
        needed=f"qwen3vl, rope.freq_base {DEFAULTS['rope_theta']:.0f}",
        hint="Pick a file of Qwen3-VL-8B.",
    )


def sizes_of(entries: Mapping[str, Entry], head_dim: Any) -> dict[str, int]:
    """The sizes that the tensors tell."""

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


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
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
