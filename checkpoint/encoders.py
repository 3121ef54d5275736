"""Ideogram 4's text encoder, the language model of Qwen3-VL, from files of any origin.

Names are Hugging Face's without their prefix: ``embed_tokens.weight``,
``layers.0.self_attn.q_proj.weight``, ``norm.weight``. Vision tower and ``lm_head`` are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CorruptFileError, NotIdeogram4Error
from .encoder_config import check_architecture, config_beside, encoder_config
from .encoder_names import NAMINGS, parse_encoder_keys
from .entries import Entry, Progress, check_shapes, main_level, stream_entries
from .mapped import FileMapping
from .origins import what_it_is
from .statements import check_heeded
from .tensor_files import TensorFiles, open_tensor_files

_OWN = "layers.0.self_attn.q_norm.weight"  # Qwen2, Llama and others have none
OPTIONAL = ("norm.weight",)  # Ideogram 4 reads hidden states before the final norm


@dataclass(frozen=True, eq=False)
class EncoderCheckpoint:
    """A text encoder's files; only headers were read so far.

    ``level``: the one that most weights of the linears have. ``config`` has the names of
    transformers' Qwen3VLTextConfig, ``tokenizer_dir`` is the folder of the tokenizer that lies
    beside the weights, if one does.
    """

    tensor_files: TensorFiles
    origin: str
    level: str
    config: dict[str, Any]
    entries: Mapping[str, Entry]
    tokenizer_dir: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self.tensor_files.files)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.tensor_files.size

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's own metadata."""
        return self.tensor_files.metadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what :meth:`stream` yields, in its order; from the headers alone.

        Raises CorruptFileError for missing tensors and for shapes that do not fit the config.
        """
        needed = encoder_shapes(self.config)
        missing = [name for name in needed if name not in self.entries and name not in OPTIONAL]
        if missing:
            raise CorruptFileError(
                f"{len(missing)} tensors of the text encoder are missing: {', '.join(missing[:3])}",
                file=self.paths[0],
                hint=CHECK_DOWNLOAD,
            )
        needed = {name: shape for name, shape in needed.items() if name in self.entries}
        check_shapes(self.entries, needed)
        return needed

    def stream(
        self,
        *,
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        mapping: FileMapping | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """``(name, tensor)`` one by one; see :meth:`Checkpoint.stream`."""
        return stream_entries(self.entries, self.shapes(), dtype, progress, mapping)

    def load(
        self,
        *,
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        mapping: FileMapping | None = None,
    ) -> dict[str, Tensor]:
        """All tensors: quantized linears as QuantizedTensor, everything else in ``dtype``."""
        return dict(self.stream(dtype=dtype, progress=progress, mapping=mapping))


def open_encoder(path: str | os.PathLike[str]) -> EncoderCheckpoint:
    """The text encoder at ``path``, from its headers: a safetensors or GGUF file, an index of
    shards, a Hugging Face folder, or a pipeline's folder with ``text_encoder/``.

    Raises NotIdeogram4Error, TruncatedFileError, CorruptFileError and CheckpointError (no such
    file, or a storage format that is not read).
    """
    path = Path(path)
    if (path / "text_encoder").is_dir():
        path = path / "text_encoder"
    tensor_files = open_tensor_files(path)
    naming, built = parse_encoder_keys(tensor_files)
    if naming is None:
        found = what_it_is(tensor_files.tensors) or f"{len(tensor_files.tensors)} other tensors"
        raise _no_encoder(path, found, " or ".join(row.anchor for row in NAMINGS))
    check_architecture(tensor_files)
    built.check()
    entries = built.entries
    beside = config_beside(tensor_files, entries)
    if _OWN not in entries:
        raise _no_encoder(path, "a language model without it", _OWN)
    config = encoder_config(tensor_files, entries, beside)
    foreign = next((name for name in entries if name not in encoder_shapes(config)), None)
    if foreign is not None:
        raise _no_encoder(path, entries[foreign].pieces[0].key, "no such tensor")
    check_heeded(tensor_files, entries.values(), beside)
    level = main_level(entries.values())
    tokenizer = _tokenizer_dir(tensor_files)
    return EncoderCheckpoint(tensor_files, naming.name, level, config, entries, tokenizer)


def _no_encoder(path: Path, found: str, needed: str) -> NotIdeogram4Error:
    return NotIdeogram4Error(
        "this is no Qwen3-VL text encoder",
        file=path,
        found=found,
        needed=needed,
        hint="Pick a file of Qwen3-VL-8B.",
    )


def encoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the language model."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"norm.weight": (hidden,)}


def _tokenizer_dir(tensor_files: TensorFiles) -> Path | None:
    """The folder with ``tokenizer.json``: the weights' own, or ``tokenizer/`` beside it."""
    folder = tensor_files.path if tensor_files.path.is_dir() else tensor_files.path.parent
    for candidate in (folder, folder.parent / "tokenizer", folder / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return candidate
    return None
