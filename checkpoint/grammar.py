"""Keys of Ideogram 4 files: ``prefix`` + ``module`` + ``suffix``, each from a table.

The three are independent of each other: any prefix meets any naming of modules and any storage, so
they are read with one grammar, and a new tool's file needs a row, not a branch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptFileError
from .canonical import is_linear
from .entries import Entry
from .files import RawTensor
from .parts import Parts

CONDITIONAL = "conditional"
UNCONDITIONAL = "unconditional"

# Prefix -> the copy that it names; None where it names none. sd.cpp's "uncond." stands inside the
# prefix that alone is the conditional copy.
PREFIXES: dict[str, str | None] = {
    "": None,
    "model.diffusion_model.": None,
    "diffusion_model.": None,
    "transformer.": None,
    "conditional.": CONDITIONAL,
    "unconditional.": UNCONDITIONAL,
    "cond.": CONDITIONAL,
    "uncond.": UNCONDITIONAL,
    "conditional_transformer.": CONDITIONAL,
    "unconditional_transformer.": UNCONDITIONAL,
    "model.diffusion_model.cond.": CONDITIONAL,
    "model.diffusion_model.uncond.": UNCONDITIONAL,
}

# Modules stored in pieces (diffusers): name -> (canonical name, number of the piece)
SPLIT_MODULES: dict[str, tuple[str, int]] = {
    "attention.to_q": ("attention.qkv", 0),
    "attention.to_k": ("attention.qkv", 1),
    "attention.to_v": ("attention.qkv", 2),
    "attention.to_out.0": ("attention.o", 0),
}
_PIECES = {"attention.qkv": ("to_q", "to_k", "to_v")}

_BITSANDBYTES = {
    "absmax": "absmax",
    "quant_map": "quant_map",
    "quant_state.bitsandbytes__nf4": "quant_state",
    "quant_state.bitsandbytes__fp4": "quant_state",
    "nested_absmax": "nested_absmax",
    "nested_quant_map": "nested_quant_map",
}

# Suffix -> (parameter, role of the stored tensor). Role None: known, not needed.
SUFFIXES: dict[str, tuple[str, str | None]] = {
    "weight": ("weight", "weight"),
    "bias": ("bias", "weight"),
    # Transformer Lab INT8
    "wq": ("weight", "weight"),
    "ws": ("weight", "scale"),
    "smooth": ("weight", "smooth"),
    # ideogram-ai FP8; ComfyUI
    "weight_scale": ("weight", "scale"),
    "comfy_quant": ("weight", "conf"),
    "pre_quant_scale": ("weight", "pre_quant_scale"),
    # what ComfyUI's save nodes write from models of this pack, see saved
    "weight_smooth": ("weight", "smooth"),
    "weight_fold_smooth": ("weight", "fold_smooth"),
    "weight_fold_rows": ("weight", "fold_rows"),
    "input_scale": ("weight", None),  # for activations in fp8, which are not used here
    # ComfyUI's older names
    "scale_weight": ("weight", "scale"),
    "scale_input": ("weight", None),
    # bitsandbytes, with and without the parameter's name in between
    **{f"weight.{suffix}": ("weight", role) for suffix, role in _BITSANDBYTES.items()},
    **{suffix: ("weight", role) for suffix, role in _BITSANDBYTES.items()},
    # scales of formats that are not read; named so that they are not passed over
    "weight_scale_2": ("weight", "unsupported"),
    "weight_scale_inv": ("weight", "unsupported"),
    "weight_s_rel": ("weight", "unsupported"),
    "weight_s_channel": ("weight", "unsupported"),
    "SCB": ("weight", "unsupported"),
}
MARKERS = ("scaled_fp8", "ideogram4_quant")  # tensors that only say how others are stored

_MODULE = re.compile(
    r"layers\.\d{1,4}\.(?:attention\.(?:qkv|o|to_q|to_k|to_v|to_out\.0|norm_q|norm_k)"
    r"|feed_forward\.w[123]|adaln_modulation|attention_norm[12]|ffn_norm[12])"
    r"|input_proj|llm_cond_norm|llm_cond_proj|t_embedding\.mlp_(?:in|out)|adaln_proj"
    r"|embed_image_indicator|final_layer\.(?:linear|adaln_modulation)"
)
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
_PREFIX = "|".join(re.escape(prefix) for prefix in sorted(PREFIXES, key=len, reverse=True))
_KEY = re.compile(f"(?P<prefix>{_PREFIX})(?P<module>{_MODULE.pattern})\\.(?P<suffix>{_SUFFIX})")

_FOLD_KEY = re.compile(
    f"(?P<prefix>{_PREFIX})fold\\.(?P<module>{_MODULE.pattern})\\.(?P<kind>smooth|rotation)"
)


@dataclass(frozen=True)
class Key:
    """What a key of a file says: ``name`` is canonical, ``piece`` None for a whole tensor."""

    prefix: str
    name: str
    piece: int | None
    suffix: str

    @property
    def role(self) -> str | None:
        return SUFFIXES[self.suffix][1]


def parse_key(key: str) -> Key | None:
    """The parts of an Ideogram 4 key, or None if it is none."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module, piece = match["module"], None
    layer = _LAYER.fullmatch(module)
    if layer is not None and layer[2] in SPLIT_MODULES:
        whole, number = SPLIT_MODULES[layer[2]]
        module = layer[1] + whole
        piece = number if whole in _PIECES else None
    parameter, _ = SUFFIXES[match["suffix"]]
    return Key(match["prefix"], f"{module}.{parameter}", piece, match["suffix"])


def parse_fold_key(key: str) -> tuple[str, str, str] | None:
    """(prefix, module, ``smooth`` or ``rotation``) of a folded file's record, or None."""
    match = _FOLD_KEY.fullmatch(key)
    return None if match is None else (match["prefix"], match["module"], match["kind"])


def build_entries(
    tensors: Iterable[tuple[Key, RawTensor]],
    stated: Mapping[str, Mapping[str, Any]],
    is_linear: Callable[[str], bool] = is_linear,
) -> dict[str, Entry]:
    """Name -> entry, from the tensors of one model.

    ``stated`` is the quantization that the file's metadata tells by key of the module. Raises
    CorruptFileError for a tensor stored twice, a scale without its weight, q, k, v incomplete.
    """
    roles: dict[str, dict[int | None, dict[str, RawTensor]]] = {}
    for key, raw in tensors:
        if key.role is None:
            continue
        found = roles.setdefault(key.name, {}).setdefault(key.piece, {})
        if key.role in found:
            raise CorruptFileError(
                "the tensor is stored twice",
                file=raw.file.path,
                tensor=raw.key,
                found=f"{found[key.role].key} too",
            )
        found[key.role] = raw
    return {name: _entry(name, pieces, stated, is_linear(name)) for name, pieces in roles.items()}


def _entry(
    name: str,
    pieces: Mapping[int | None, Mapping[str, RawTensor]],
    stated: Mapping[str, Mapping[str, Any]],
    linear: bool,
) -> Entry:
    any_raw = next(iter(next(iter(pieces.values())).values()))
    numbers = set(pieces)
    if numbers not in ({None}, {0, 1, 2}):
        module = _LAYER.fullmatch(name.rpartition(".")[0])
        names = _PIECES[module[2]] if module else ()
        missing = [names[i] for i in range(len(names)) if i not in numbers]
        raise CorruptFileError(
            "the tensor is stored in pieces and not all are there, or whole as well",
            file=any_raw.file.path,
            tensor=any_raw.key,
            found=f"no {', '.join(missing)}" if missing else "both forms",
            needed=f"{', '.join(names)} or {name}",
        )
    dimensions = 2 if linear or "embed_" in name else 1
    parts = []
    for _, roles in sorted(pieces.items(), key=lambda item: item[0] or 0):
        if "weight" not in roles:
            raise CorruptFileError(
                "a tensor without its weight",
                file=any_raw.file.path,
                tensor=next(iter(roles.values())).key,
                needed=name,
            )
        weight = _squeezed(roles["weight"], dimensions)
        module_key = weight.key.rpartition(".")[0]
        parts.append(Parts(weight.key, {**roles, "weight": weight}, stated.get(module_key)))
    return Entry(name, tuple(parts), linear)


def _squeezed(raw: RawTensor, dimensions: int) -> RawTensor:
    """Without the leading ones that some writers of GGUF add."""
    extra = max(0, len(raw.shape) - dimensions)
    if extra and all(size == 1 for size in raw.shape[:extra]):
        return dataclasses.replace(raw, shape=raw.shape[extra:])
    return raw
