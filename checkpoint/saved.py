"""Weights as ComfyUI's save nodes write them from models of this pack, and what they say of it.

``comfy_quant`` beside each weight names the format, as its layout describes itself. INT8 without
smoothing and FP8 of one scale are stock formats, NF4 is bitsandbytes'. ``ideogram4_quant`` at the
model's root is uint8 JSON: ``copy``, ``config``, ``guidance`` and ``attention``, which the host's
metadata do not tell.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CorruptFileError
from ..ops.blocks import FORMATS
from ..ops.fold import Fold
from ..ops.layouts import folded_tensor
from ..ops.rotation import is_order
from .attention_wish import WISH_KEY
from .branches import GUIDANCE_KEY, GUIDANCE_NONE, GUIDANCE_PAIR, PRESET_KEY
from .codecs import FOLDED_INT8, Blocks, Int8, Stored
from .parts import Parts
from .tensor_files import TensorFiles, json_object

SAVED_GGUF = "ideogram4_quant_gguf"
FOLDED_GGUF = "ideogram4_quant_folded_gguf"
WORDS = "ideogram4_quant"
"""Key of what a saved model says of itself."""

_MAX_WORDS = 1 << 14
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class SavedBlocks(Blocks):
    """GGUF blocks in safetensors: uint8 [N, bytes of a row], type and shape in ``comfy_quant``."""

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.quantization().get("format") == SAVED_GGUF

    @classmethod
    def level(cls, parts: Parts) -> str:
        parts.check_format(SAVED_GGUF, FOLDED_GGUF, keys=("qtype", "shape", "fold"))
        qtype = parts.quantization().get("qtype")
        if not isinstance(qtype, str) or qtype not in FORMATS:
            raise parts.unsupported(qtype)
        return qtype

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        shape = parts.quantization().get("shape")
        sizes = shape if isinstance(shape, list) and len(shape) == 2 else [None]
        if not all(type(size) is int and 0 < size < _MAX_SIZE for size in sizes):
            raise parts.corrupt("unusable shape in comfy_quant", repr(shape)[:40], "[N, K]")
        return tuple(shape)

    @classmethod
    def read(cls, parts: Parts) -> SavedBlocks:
        return cls(parts.weight.read(), cls.level(parts), cls.shape(parts))


@dataclass(frozen=True)
class SavedFolded(Stored):
    """A weight of a folded file: ``inner`` is ``W'``, seen as W through ``fold``."""

    ROLES = ("scale", "smooth", "fold_smooth", "fold_rows")
    inner: Stored
    fold: Fold

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.quantization().get("format") in (FOLDED_INT8, FOLDED_GGUF)

    @classmethod
    def _codec(cls, parts: Parts) -> type[Stored]:
        return Int8 if parts.quantization()["format"] == FOLDED_INT8 else SavedBlocks

    @classmethod
    def level(cls, parts: Parts) -> str:
        return cls._codec(parts).level(parts)

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        return cls._codec(parts).shape(parts)

    @classmethod
    def read(cls, parts: Parts) -> SavedFolded:
        stated = parts.quantization().get("fold")
        stated = stated if isinstance(stated, dict) else {}
        rows, columns = cls.shape(parts)
        groups = [stated.get(name) for name in ("rotation", "row_rotation")]
        first = stated.get("first_row", 0)
        usable = all(g is None or (type(g) is int and is_order(g)) for g in groups)
        if not usable or type(first) is not int:
            raise parts.corrupt("unusable fold in comfy_quant", repr(stated)[:80], "powers of 2")
        vectors = {
            name: parts.vector(f"fold_{name}", (size,)) if f"fold_{name}" in parts.roles else None
            for name, size in (("smooth", columns), ("rows", rows))
        }
        fold = Fold(vectors["smooth"], groups[0], vectors["rows"], groups[1], first)
        return cls(cls._codec(parts).read(parts), fold)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return folded_tensor(self.inner.tensor(dtype), self.fold)


def with_words(tensor_files: TensorFiles, prefixes: Mapping[str, str | None]) -> TensorFiles:
    """The container with what a saved model says of itself as its metadata, which go first.

    Raises CorruptFileError if that cannot be read.
    """
    for prefix in prefixes:
        raw = tensor_files.tensors.get(prefix + WORDS)
        if raw is None:
            continue
        if raw.dtype != "U8" or raw.nbytes > _MAX_WORDS:
            raise _corrupt(tensor_files, raw.key, f"{raw.nbytes} bytes of {raw.dtype}")
        try:
            text = raw.read().numpy().tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise _corrupt(tensor_files, raw.key, error) from error
        said = json_object(text, raw.key, tensor_files.path)
        copy, config = said.get("copy"), said.get("config")
        metadata: dict[str, Any] = {}
        if isinstance(copy, str):
            metadata["ideogram4.copy"] = copy
        if isinstance(config, dict):
            metadata["ideogram4.config"] = json.dumps(config)
        if said.get("guidance") in (GUIDANCE_NONE, GUIDANCE_PAIR):
            metadata[GUIDANCE_KEY] = said["guidance"]
        if isinstance(said.get("preset"), str):
            metadata[PRESET_KEY] = said["preset"]
        if isinstance(said.get("attention"), str):
            metadata[WISH_KEY] = said["attention"]
        return dataclasses.replace(tensor_files, metadata=metadata | tensor_files.metadata)
    return tensor_files


def _corrupt(tensor_files: TensorFiles, key: str, found: object) -> CorruptFileError:
    return CorruptFileError(
        "what the model says of itself cannot be read",
        file=tensor_files.path,
        tensor=key,
        found=found,
        needed="a short text",
        hint=CHECK_DOWNLOAD,
    )
