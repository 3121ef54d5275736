"""Which tool's file this is: a table of origins, told by what the keys hold.

An origin is a name for people. How tensors are read follows from their keys (``grammar``) and their
stored form (``codecs``), so a file that mixes origins is read all the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import NotIdeogram4Error
from .files import RawTensor
from .grammar import Key, not_supported
from .suffixes import OTHER
from .tensor_files import TensorFiles


@dataclass(frozen=True)
class Origin:
    """A file is of this origin if it is of ``kind`` and holds all of ``marks``.

    A mark is a suffix of a key (``wq``), with the dtype of its tensor where that tells
    (``weight I8``), a prefix (``cond.``) or ``split`` for q, k and v in pieces.
    """

    name: str
    kind: str
    marks: frozenset[str] = frozenset()
    linears_only: bool = False


# The first that fits names the file.
ORIGINS: tuple[Origin, ...] = (
    Origin("Transformer Lab INT8", "safetensors", frozenset({"wq", "ws"}), linears_only=True),
    Origin("Transformer Lab GGUF", "gguf", frozenset({"cond.", "uncond."})),
    Origin("GGUF", "gguf"),
    Origin("SDNQ", "safetensors", frozenset({"comfy_quant", "scale"})),
    Origin("diffusers", "safetensors", frozenset({"split"})),
    Origin("bitsandbytes NF4", "safetensors", frozenset({"absmax"})),
    Origin("ComfyUI", "safetensors", frozenset({"comfy_quant"})),  # of whichever level
    Origin("ComfyUI FP8, older names", "safetensors", frozenset({"scale_weight"})),
    Origin("ideogram-ai FP8", "safetensors", frozenset({"weight_scale", "weight F8_E4M3"})),
    Origin("safetensors", "safetensors"),
)

_LONG_ENOUGH, _MANY_ENOUGH = 200, 4000  # characters, keys: more than any of these models has

# What else a file may be: (a key in it, its name)
_OTHER_MODELS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"lora_(?:A|B|up|down|a|b)\b|\.lokr_|\.hada_", "a LoRA, which goes into a LoRA loader"),
        (r"(?:^|\.)double_(?:stream_)?blocks?\.", "a FLUX model"),
        (r"(?:^|\.)joint_blocks\.", "Stable Diffusion 3"),
        (r"(?:^|\.)transformer_blocks\.\d+\.img_mod\.", "Qwen-Image"),
        (r"(?:^|\.)(?:noise|context)_refiner\.", "Lumina 2 or Z-Image"),
        (r"(?:^|\.)txtfusion\.", "Krea 2"),
        (r"(?:^|\.)blocks\.\d+\.cross_attn\.", "Wan or Cosmos"),
        (r"(?:^|\.)transformer_blocks\.\d+\.", "another diffusion transformer"),
        (r"(?:^|\.)(?:input_blocks|down_blocks\.\d+\.attentions)\.", "Stable Diffusion"),
        (r"^v\.blk\.|^mm\.", "the vision part (mmproj) of a language model"),
        (r"\.self_attn\.q_proj\.|^blk\.\d+\.attn_q\.", "a text encoder or language model"),
        (r"(?:^|\.)encoder\.block\.\d+\.layer\.", "a T5 text encoder"),
        (r"(?:^|\.)decoder\.(?:conv_in|up_blocks|up)\b", "a VAE"),
    )
)

_OURS = re.compile(r"(?:^|\.)adaln_proj\.|(?:^|\.)layers\.\d+\.adaln_modulation\.")

# Modules that no other model has together; norms and embeddings are absent from some files.
_SIGNATURE = (
    "layers.0.feed_forward.w1.weight",
    "layers.0.adaln_modulation.weight",
    "adaln_proj.weight",
)


def check_is_ideogram4(keys: Mapping[Key, RawTensor], tensor_files: TensorFiles) -> None:
    """NotIdeogram4Error unless ``keys`` hold what makes an Ideogram 4 transformer.

    CheckpointError where they do under names of a format that is not read.
    """
    names = {key.name for key in keys if key.role == "weight"}
    missing = [name for name in _SIGNATURE if name not in names]
    if missing:
        looks_like = what_else(tensor_files.tensors)
        for key, raw in keys.items() if looks_like is None else ():
            if key.role == OTHER and key.name in missing:
                raise not_supported(key, raw)
        raise NotIdeogram4Error(
            "this is no Ideogram 4 transformer",
            file=tensor_files.path,
            found=looks_like or f"no {missing[0]} among {len(tensor_files.tensors)} tensors",
            hint="Pick a file of Ideogram 4's conditional or unconditional copy.",
        )


def what_else(keys: Iterable[str]) -> str | None:
    """The model that has such keys, if it is a well-known one."""
    # a stranger's four megabytes of names would take a second
    keys = [key[:_LONG_ENOUGH] for key in itertools.islice(keys, _MANY_ENOUGH)]
    for pattern, what in _OTHER_MODELS:
        if any(pattern.search(key) for key in keys):
            return what
    return None


def what_it_is(keys: Iterable[str]) -> str | None:
    """The same where another kind of file is wanted: also Ideogram 4's own transformer."""
    keys = [key[:_LONG_ENOUGH] for key in itertools.islice(keys, _MANY_ENOUGH)]
    ours = any(_OURS.search(key) for key in keys)
    return what_else(keys) or ("an Ideogram 4 transformer" if ours else None)


def origin_of(tensor_files: TensorFiles, keys: Mapping[Key, RawTensor], *, stated: bool) -> Origin:
    """The row of ORIGINS that fits; ``stated``: the metadata describes the quantization."""
    marks = {"comfy_quant"} if stated else set()
    for key, raw in keys.items():
        # bitsandbytes puts the parameter's name before its own suffix
        suffix = key.suffix.removeprefix("weight.")
        marks |= {suffix, f"{suffix} {raw.dtype}", key.prefix}
        if key.piece is not None:
            marks.add("split")
    return next(row for row in ORIGINS if row.kind == tensor_files.kind and row.marks <= marks)
