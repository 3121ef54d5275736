"""One or many files of either format, seen as one table of named tensors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..errors import DOWNLOAD_AGAIN, CheckpointError, CorruptFileError, TruncatedFileError
from ..gguf_loader import GGUFHeader, header_of
from .files import RawTensor, SourceFile
from .safetensors_header import MAX_HEADER, MAX_TENSORS, parse_json, safetensors_header_of

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
_USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_MAX_CONFIG = 1 << 20
_MAX_SHARDS = 1 << 10  # the largest language models have 200

# What people save under a model's name: (first bytes, what it is, what to do)
_NOT_A_MODEL = (
    (b"version https://git-lfs", "a Git LFS pointer", "Fetch the file itself: git lfs pull."),
    (b"<!DOCTYPE", "a web page", "Download the file itself, logged in if the site asks for it."),
    (b"<html", "a web page", "Download the file itself, logged in if the site asks for it."),
    (b"PK\x03\x04", "a zip archive or a PyTorch pickle", "Use the safetensors file of the model."),
    (b"\x80\x02", "a Python pickle, which can run code", "Use the safetensors file of the model."),
)


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a file, or of all shards of a model. ``kind``: ``safetensors`` or ``gguf``.

    ``metadata`` of shards: the first value of each key. ``said``: all of it, shard by shard, and
    last what the index says.
    """

    path: Path
    kind: str
    files: tuple[SourceFile, ...]
    tensors: dict[str, RawTensor]
    metadata: dict[str, Any]
    header: GGUFHeader | None = None
    said: tuple[dict[str, Any], ...] = ()

    def stated(self) -> tuple[dict[str, Any], ...]:
        """The metadata, apart where several files or the index have their own."""
        return self.said or (self.metadata,)

    def array(self, key: str) -> list[Any]:
        """The elements of a metadata array of a GGUF file, which ``metadata`` only refers to."""
        if self.header is None:
            raise KeyError(key)
        return self.header.array(key)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.size for file in self.files)

    def load(self) -> dict[str, Tensor]:
        """Every tensor as it is stored, in memory: the files may vanish afterwards."""
        return {name: raw.read() for name, raw in self.tensors.items()}


def open_tensor_files(path: str | os.PathLike[str]) -> TensorFiles:
    """The headers of a safetensors or GGUF file, of an index of shards, or of a folder with one.

    Naming one shard opens all of them. Raises CheckpointError (nothing there, or not a model),
    TruncatedFileError and CorruptFileError.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=path) from error


def _open(path: Path) -> TensorFiles:
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError("there is no such file", file=path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is not None and 1 <= int(shard["number"]) <= int(shard["count"]):
        return _open_shards(path, shard)
    return _open_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file such as ``config.json``; CorruptFileError if it is none."""
    return _read_json(path, _MAX_CONFIG)


def json_object(text: str, key: str, path: Path) -> dict[str, Any]:
    """The JSON object in the metadata value ``key``; CorruptFileError if it is none."""
    raw = text.encode("utf-8")
    if len(raw) > _MAX_CONFIG:
        raise CorruptFileError(
            f"metadata {key} is too long",
            file=path,
            found=len(raw),
            needed=f"at most {_MAX_CONFIG}",
        )
    return parse_json(raw, path, f"metadata {key}")


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    size = path.stat().st_size
    if size > limit:
        raise CorruptFileError(
            "too long for its kind", file=path, found=f"{size} bytes", needed=f"at most {limit}"
        )
    return parse_json(path.read_bytes(), path, "the file")


def _open_file(path: Path) -> TensorFiles:
    with open(path, "rb") as stream:
        start = stream.read(32)
        stream.seek(0)
        for magic, what, hint in _NOT_A_MODEL:
            # byte 8 opens the JSON of a safetensors file, whose length may begin with any bytes
            if start.startswith(magic) and start[8:9] != b"{":
                raise CorruptFileError(f"this is {what}, not a model", file=path, hint=hint)
        if start.startswith(b"GGUF"):
            return _gguf_of(path, stream)
        file, tensors, metadata = safetensors_header_of(path, stream)
    return TensorFiles(path, "safetensors", (file,), tensors, dict(metadata))


def _gguf_of(path: Path, stream: BinaryIO) -> TensorFiles:
    header = header_of(path, stream)
    parts = header.metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            "this is one part of a split GGUF file",
            file=path,
            found=f"{parts} parts",
            hint="Join them first: llama-gguf-split --merge.",
        )
    file = SourceFile(path, header.file_size, header.mtime_ns)
    tensors = {
        tensor.name: RawTensor(
            file, tensor.name, tensor.type_name, tensor.shape, tensor.offset, tensor.nbytes
        )
        for tensor in header.tensors.values()
    }
    return TensorFiles(path, "gguf", (file,), tensors, header.metadata, header)


def _open_folder(folder: Path) -> TensorFiles:
    indexes = sorted(folder.glob("*" + INDEX_SUFFIX))
    files = sorted(folder.glob("*.safetensors"))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(indexes) == 1:
        return _open_index(indexes[0])
    for name in _USUAL_NAMES:
        if folder / name in files:
            return _open_file(folder / name)
    shard = _SHARD.fullmatch(files[0].name) if files else None
    if shard is not None and len(files) == int(shard["count"]):
        return _open_shards(files[0], shard)
    if len(files) + len(ggufs) == 1:
        return _open_file((files + ggufs)[0])
    names = [file.name for file in files + ggufs]
    raise CheckpointError(
        "the folder does not say which file to open" if names else "the folder holds no model",
        file=folder,
        found=", ".join(names[:6]) or "no .safetensors and no .gguf file",
        hint="Name one file." if names else None,
    )


def _open_index(path: Path) -> TensorFiles:
    """All shards that an index names, each tensor in the shard that the index says."""
    index = _read_json(path, MAX_HEADER)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError("the index has no weight_map", file=path, hint=DOWNLOAD_AGAIN)
    names = set()
    for key, name in weight_map.items():
        # a name from an untrusted file stays in its folder
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise CorruptFileError(
                "the index names no plain file", file=path, tensor=key, found=repr(name)[:80]
            )
        names.add(name)
    tensor_files = _merge(path, sorted(names))
    for key, name in weight_map.items():
        raw = tensor_files.tensors.get(key)
        if raw is None or raw.file.path.name != name:
            raise CorruptFileError(
                f"the tensor is not in {name}", file=path, tensor=key, hint=DOWNLOAD_AGAIN
            )
    about = {key: value for key, value in index.items() if key not in ("weight_map", "metadata")}
    if isinstance(index.get("metadata"), dict):
        about = index["metadata"] | about
    return dataclasses.replace(tensor_files, said=(*tensor_files.said, about))


def _open_shards(path: Path, shard: re.Match[str]) -> TensorFiles:
    index = path.with_name(shard["stem"] + INDEX_SUFFIX)
    if index.is_file():
        return _open_index(index)
    count = int(shard["count"])
    names = [f"{shard['stem']}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return _merge(path, names)


def _merge(path: Path, names: Sequence[str]) -> TensorFiles:
    """The shards of these names in the folder of ``path``."""
    if len(names) > _MAX_SHARDS:
        raise CorruptFileError(
            "too many shards", file=path, found=len(names), needed=f"at most {_MAX_SHARDS}"
        )
    shards = [path.with_name(name) for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise TruncatedFileError(
            f"{len(missing)} of {len(shards)} shards are missing",
            file=path,
            found=f"no {missing[0]}",
            hint="Download the missing files into the same folder.",
        )
    tensors: dict[str, RawTensor] = {}
    metadata: dict[str, Any] = {}
    files = []
    said: list[dict[str, Any]] = []
    spoken = 0  # characters of metadata, those that a later shard repeats too
    for shard in shards:
        part = _open_file(shard)
        said.append(part.metadata)
        spoken += sum(len(key) + len(str(value)) for key, value in part.metadata.items())
        if len(tensors) + len(part.tensors) > MAX_TENSORS or spoken > MAX_HEADER:
            raise CorruptFileError(
                "the shards together hold too many tensors or too much metadata",
                file=shard,
                found=f"{len(tensors) + len(part.tensors):,} tensors, {spoken:,} characters",
                needed=f"at most {MAX_TENSORS:,} and {MAX_HEADER:,}",
            )
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CorruptFileError("the tensor is in two shards", file=shard, tensor=min(twice))
        tensors |= part.tensors
        metadata = part.metadata | metadata
        files += part.files
    return TensorFiles(path, "safetensors", tuple(files), tensors, metadata, said=tuple(said))
