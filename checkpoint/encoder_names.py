"""Keys of text encoder files: two namings of the same modules, with any prefix before them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError, NotIdeogram4Error
from .files import RawTensor
from .grammar import Built, Key, build_entries, parameter_of
from .parts import NOT_SUPPORTED, USE_INSTEAD
from .statements import matched
from .tensor_files import TensorFiles

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

# A linear of a layer anywhere in a name, with dots or as LoRA files write it
_MODULE = re.compile(
    r"(?:layers[._]\d{1,4}[._](?:self_attn[._][qkvo]_proj|mlp[._](?:gate|up|down)_proj)"
    r"|blk[._]\d{1,4}[._](?:attn_(?:q|k|v|output)|ffn_(?:gate|up|down)))(?![A-Za-z0-9_]*norm)"
    r"(?![A-Za-z0-9])"
)
_LONG = 400  # characters of a name that are looked at; ours have 60

# Not a weight: older transformers stored the frequencies of the rotary embedding in every layer.
_IN_LAYERS_TOO = re.compile(r"self_attn\.rotary_emb\.inv_freq")


def parse_encoder_keys(tensor_files: TensorFiles) -> tuple[Naming | None, Built]:
    """(the naming in use, the entries); None and no entries if the file is no such encoder.

    Tensors outside the language model (vision, ``lm_head``) are left out without a word. Raises
    NotIdeogram4Error for a layer with a module that Qwen3 has not, CheckpointError for a
    tensor that names a linear here and stands under no weight of that name, and for what
    ``statements.matched`` and ``build_entries`` refuse.
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
            else:
                _refuse_other_module(name, naming, prefix, tensor_files)
                _refuse_other_prefix(name, raw, tensor_files)
        stated = matched(tensor_files, tensors, _parser(naming))
        return naming, build_entries(tensors, stated, _is_linear)
    return None, Built({})


def _parser(naming: Naming) -> Callable[[str], Key | None]:
    """A function that takes a name without a prefix to its key, or None."""
    pattern = _pattern(naming, "")

    def parse(name: str) -> Key | None:
        match = pattern.fullmatch(name)
        return None if match is None else _key(match, naming, "")

    return parse


def _refuse_other_module(name: str, naming: Naming, prefix: str, tensor_files: TensorFiles) -> None:
    start = prefix + naming.layer
    number, _, module = name.removeprefix(start).partition(".")
    if not name.startswith(start) or not number.isdecimal() or _IN_LAYERS_TOO.fullmatch(module):
        return
    raise NotIdeogram4Error(
        "this is no Qwen3-VL text encoder: its layers have no such tensor",
        file=tensor_files.path,
        tensor=name,
        hint="Pick a file of Qwen3-VL-8B.",
    )


def _refuse_other_prefix(name: str, raw: RawTensor, tensor_files: TensorFiles) -> None:
    """CheckpointError for what a tool keeps of a weight here under a prefix of its own."""
    module = _MODULE.search(name[:_LONG])
    if module is not None and f"{name[: module.end()]}.weight" not in tensor_files.tensors:
        raise CheckpointError(
            NOT_SUPPORTED,
            file=raw.file.path,
            tensor=name,
            found="a tensor of a linear, under a prefix that its weight has not",
            hint=USE_INSTEAD,
        )


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
        f"(?P<inside>{inside})|(?P<outside>{outside}))\\.(?P<suffix>.+)",
        re.DOTALL,
    )


def _key(match: re.Match[str], naming: Naming, prefix: str) -> Key:
    if match["outside"]:
        module = naming.outside[match["outside"]]
    else:
        module = f"layers.{int(match['number'])}.{naming.in_layer[match['inside']]}"
    name = f"{module}.{parameter_of(match['suffix'])}"
    return Key(prefix, name, None, match["suffix"])


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")
