"""What an encoder's file has for writing, beside what conditioning reads: head and vision tower.

Conditioning takes hidden states before the final norm; writing text takes that norm and a head
(``lm_head.weight`` [vocabulary, hidden]; llama.cpp: ``output.weight``), looking at a picture takes
the vision tower (``visual.``). The head also comes as a small file of its own, which diffusers
publishes for encoders without one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CheckpointError, CorruptFileError
from .encoder_config import config_beside
from .encoders import EncoderCheckpoint
from .entries import Entry, check_shapes, stream_entries
from .files import RawTensor
from .grammar import Key, build_entries, parameter_of
from .listing import Listing
from .safetensors_header import read_safetensors_header
from .statements import matched
from .suffixes import SUFFIXES
from .tensor_files import TensorFiles, open_tensor_files

HEAD = "lm_head.weight"
_HEAD_KEY = re.compile(r"(?P<prefix>(?:[\w.]+\.)?)lm_head\.(?P<rest>.+)", re.DOTALL)
_GGUF_HEAD_KEY = re.compile(r"(?P<prefix>)output\.(?P<rest>.+)", re.DOTALL)
_VISION_KEY = re.compile(r"(?P<prefix>(?:[\w.]+\.)?)visual\.(?P<rest>.+)", re.DOTALL)
_VISION_LINEAR = re.compile(r"(?:.*\.)?(?:qkv|linear_fc[12]|attn\.proj)\.weight")
_RELEASED_HEADS = 16  # of attention, in the vision towers of 4B, 8B and 32B
_RELEASED_DEEPSTACK = {27: [8, 16, 24], 24: [5, 11, 17]}  # by depth
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
_DEEPSTACK = re.compile(r"deepstack_merger_list\.(\d{1,4})\.")


@dataclass(frozen=True, eq=False)
class Part:
    """One such part of a file: ``entries`` by the names of transformers without a prefix.

    ``config``, of a vision tower: the names of transformers' Qwen3VLVisionConfig.
    """

    path: Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Stored bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    def load(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """All tensors: quantized linears as QuantizedTensor, everything else in ``dtype``."""
        return dict(stream_entries(self.entries, self.entries, dtype, None))


def find_head(encoder: EncoderCheckpoint) -> Part | None:
    """The head in the encoder's own file; CorruptFileError where it has another size."""
    return _head(encoder.tensor_files, encoder.config)


def open_head(path: str | os.PathLike[str], encoder: EncoderCheckpoint) -> Part:
    """The head in a file of its own; CheckpointError where it holds none that fits the encoder."""
    part = _head(open_tensor_files(Path(path)), encoder.config)
    if part is None:
        raise CheckpointError(
            "there is no head for writing in this file",
            file=path,
            found=f"no {HEAD}",
            hint="Take the file of diffusers/qwen3-vl-8b-instruct-lm-head.",
        )
    return part


def head_beside(listing: Listing, encoder: EncoderCheckpoint) -> Part | None:
    """The first file of a listing that is such a head and nothing else, and fits the encoder."""
    needed = (encoder.config["vocab_size"], encoder.config["hidden_size"])
    for name in listing.names:
        if is_head(listing.paths[name], needed):
            return open_head(listing.paths[name], encoder)
    return None


def is_head(path: Path, shape: tuple[int, int] | None = None) -> bool:
    """Whether a safetensors file holds a head alone, from its header; of ``shape``, if one is
    given. False for what cannot be read."""
    if not path.is_file() or path.suffix.lower() not in (".safetensors", ".sft"):
        return False
    try:
        tensors = read_safetensors_header(path)[1]
    except (CheckpointError, OSError):
        return False
    heads = [raw for key, raw in tensors.items() if _HEAD_KEY.fullmatch(key)]
    if not heads or len(heads) != len(tensors):
        return False
    return shape is None or any(tuple(raw.shape) == shape for raw in heads)


def find_vision(encoder: EncoderCheckpoint) -> Part | None:
    """The vision tower in the encoder's file, None where there is none.

    Raises CorruptFileError for one whose tensors do not make the tower that its config tells.
    """
    files = encoder.tensor_files
    entries = _entries(files, _VISION_KEY, "", lambda name: bool(_VISION_LINEAR.fullmatch(name)))
    if not entries:
        return None
    beside = config_beside(files, encoder.entries) or {}
    stated = beside.get("vision_config")
    config = _vision_config(entries, stated if isinstance(stated, dict) else {}, files.path)
    if config["out_hidden_size"] != encoder.config["hidden_size"]:
        raise _no_tower(files.path, f"it writes {config['out_hidden_size']} features")
    return Part(files.path, entries, config)


def _head(files: TensorFiles, config: Mapping[str, Any]) -> Part | None:
    pattern = _GGUF_HEAD_KEY if files.kind == "gguf" else _HEAD_KEY
    entries = _entries(files, pattern, "lm_head.", lambda name: name == HEAD)
    if HEAD not in entries:
        return None
    entries = {HEAD: entries[HEAD]}
    check_shapes(entries, {HEAD: (config["vocab_size"], config["hidden_size"])})
    return Part(files.path, entries, {})


def _entries(
    files: TensorFiles, pattern: re.Pattern[str], start: str, is_linear: Callable[[str], bool]
) -> dict[str, Entry]:
    """The entries of the tensors that match, under ``start`` and what stands behind the prefix."""

    def parse(name: str) -> Key | None:
        match = pattern.fullmatch(name)
        if match is None:
            return None
        module, suffix = _split(match["rest"])
        name = ".".join(filter(None, (start + module).split("."))) + "." + parameter_of(suffix)
        return Key(match["prefix"], name, None, suffix)

    tensors: list[tuple[Key, RawTensor]] = []
    for name, raw in files.tensors.items():
        key = parse(name)
        if key is not None:
            tensors.append((key, raw))
    built = build_entries(tensors, matched(files, tensors, parse), is_linear)
    built.check()
    return built.entries


def _split(rest: str) -> tuple[str, str]:
    """(module, suffix) of a key without its prefix; the longest suffix that is known."""
    parts = rest.split(".")
    for i in range(len(parts)):
        if ".".join(parts[i:]) in SUFFIXES:
            return ".".join(parts[:i]), ".".join(parts[i:])
    return ".".join(parts[:-1]), parts[-1]


def _vision_config(
    entries: Mapping[str, Entry], stated: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Sizes from the tensors; what they do not tell from the config, else the released models'."""
    try:
        hidden, channels, temporal, patch, _ = entries["patch_embed.proj.weight"].shape
        depth = len({m[1] for name in entries if (m := _BLOCK.match(name))})
        merged = entries["merger.linear_fc1.weight"].shape[0]
        out, _ = entries["merger.linear_fc2.weight"].shape
        inner, _ = entries["blocks.0.mlp.linear_fc1.weight"].shape
        positions, _ = entries["pos_embed.weight"].shape
    except (KeyError, ValueError) as error:
        raise _no_tower(path, f"no usable {error}") from error
    stacked = len({m[1] for name in entries if (m := _DEEPSTACK.match(name))})
    layers = stated.get("deepstack_visual_indexes", _RELEASED_DEEPSTACK.get(depth))
    heads = stated.get("num_heads", _RELEASED_HEADS)
    fits = isinstance(layers, list) and all(type(i) is int and 0 <= i < depth for i in layers)
    if not fits or len(layers) != stacked:
        raise _no_tower(path, f"{stacked} deepstack mergers of a tower of {depth} blocks")
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise _no_tower(path, f"{heads} heads in {hidden} features")
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch,
        "temporal_patch_size": temporal,
        "in_channels": channels,
        "spatial_merge_size": math.isqrt(max(merged // hidden, 1)),
        "num_position_embeddings": positions,
        "deepstack_visual_indexes": layers,
        "out_hidden_size": out,
    }


def _no_tower(path: Path, found: str) -> CorruptFileError:
    return CorruptFileError(
        "the vision tower beside the text encoder cannot be used",
        file=path,
        found=found,
        needed="that of Qwen3-VL-8B",
        hint=CHECK_DOWNLOAD,
    )
