"""Keys of text encoder files: two namings of the same modules, with any prefix before them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .entries import Entry
from .files import RawTensor
from .grammar import SUFFIXES, Key, build_entries
from .tensor_files import TensorFiles, stated_quantization

_LAYER_MODULES = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)


@dataclass(frozen=True)
class Naming:
    """``anchor``: a module that tells the naming and, by what stands before it, the prefix.

    ``layer``: the text before a layer's number; ``prefixed``: whether keys may have a prefix; the
    tables map the file's modules to ours.
    """

    name: str
    anchor: str
    layer: str
    prefixed: bool
    in_layer: Mapping[str, str]
    outside: Mapping[str, str]


NAMINGS = (
    Naming(
        "Hugging Face",
        "layers.0.self_attn.q_proj.",
        "layers.",
        True,
        {name: name for name in _LAYER_MODULES},
        {"embed_tokens": "embed_tokens", "norm": "norm"},
    ),
    # Source: llama.cpp, gguf-py's tensor mapping for qwen3vl; queries and keys are not permuted.
    Naming(
        "llama.cpp GGUF",
        "blk.0.attn_q.",
        "blk.",
        False,
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        {"token_embd": "embed_tokens", "output_norm": "norm"},
    ),
)

_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))


def parse_encoder_keys(tensor_files: TensorFiles) -> tuple[Naming | None, dict[str, Entry]]:
    """(the naming in use, name -> entry); (None, {}) if the file is no such encoder.

    Tensors outside the language model (vision, ``lm_head``) are left out without a word.
    """
    for naming in NAMINGS:
        prefix = _prefix(tensor_files, naming.anchor)
        if prefix is None or (prefix and not naming.prefixed):
            continue
        pattern = _pattern(naming, prefix)
        tensors: list[tuple[Key, RawTensor]] = []
        for name, raw in tensor_files.tensors.items():
            match = pattern.fullmatch(name)
            if match is not None:
                tensors.append((_key(match, naming, prefix), raw))
        return naming, build_entries(tensors, stated_quantization(tensor_files), _is_linear)
    return None, {}


def _prefix(tensor_files: TensorFiles, anchor: str) -> str | None:
    """What stands before ``anchor`` in the file's keys: the shortest, should there be several."""
    found = {
        name[: name.index(anchor)]
        for name in tensor_files.tensors
        if anchor in name and (name.startswith(anchor) or f".{anchor}" in name)
    }
    return min(found, key=len) if found else None


def _pattern(naming: Naming, prefix: str) -> re.Pattern[str]:
    inside = "|".join(re.escape(name) for name in sorted(naming.in_layer, key=len, reverse=True))
    outside = "|".join(re.escape(name) for name in naming.outside)
    return re.compile(
        f"{re.escape(prefix)}(?:{re.escape(naming.layer)}(?P<number>[0-9]{{1,4}})\\."
        f"(?P<inside>{inside})|(?P<outside>{outside}))\\.(?P<suffix>{_SUFFIX})"
    )


def _key(match: re.Match[str], naming: Naming, prefix: str) -> Key:
    if match["outside"]:
        module = naming.outside[match["outside"]]
    else:
        module = f"layers.{int(match['number'])}.{naming.in_layer[match['inside']]}"
    parameter, _ = SUFFIXES[match["suffix"]]
    return Key(prefix, f"{module}.{parameter}", None, match["suffix"])


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")
