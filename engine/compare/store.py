"""Pictures already made, kept by the hash of everything that made them.

A picture's key covers the content of the model files, the encoder, the VAE, the settings, the case
and the versions of what computes, so a changed file, setting or library is never answered with an
old picture, and a broken run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ...checkpoint import write_safetensors
from ...checkpoint.tensor_files import open_tensor_files
from ...errors import CheckpointError
from ...files.new_file import make_folder, replaced
from ...quant.provenance import hash_files
from ..pictures import read_picture
from .cases import Case, CompareError

#: Part of every key; raised when the engine starts to make other pictures from the same inputs.
VERSION = 1

_PICTURE, _RECORD, _LATENTS = ".png", ".json", ".safetensors"
# What of a model's folder counts: weights, configurations, the tokenizer's tables, chat templates.
_MODEL_FILES = (".safetensors", ".json", ".txt", ".jinja")
_DELETE = "Delete it: the next run makes it anew."


@dataclass(frozen=True)
class Record:
    """What is kept beside a picture: seconds to sample, and what OCR read (``None``: not asked)."""

    seconds: float
    read: str | None


class Store:
    """A folder of pictures by key; safe for several processes, which write whole files only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def _file(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}{suffix}"

    def has(self, key: str, *, trajectory: bool) -> bool:
        """Whether the picture is there; with its latents where they are wanted."""
        needed = (_RECORD, _PICTURE, _LATENTS) if trajectory else (_RECORD, _PICTURE)
        return all(self._file(key, suffix).is_file() for suffix in needed)  # the record is last

    def save(
        self, key: str, picture: Image.Image, record: Record, latents: torch.Tensor | None
    ) -> None:
        """Keep a picture; its record comes last, so a half-kept one is made anew."""
        make_folder(self._file(key, _PICTURE).parent)
        self._write(key, _PICTURE, lambda file: picture.save(file, format="PNG"))
        if latents is not None:
            latents_file = self._file(key, _LATENTS)
            write_safetensors(latents_file, {"latents": latents}, overwrite=True)
        text = json.dumps({"seconds": record.seconds, "read": record.read})
        self._write(key, _RECORD, lambda file: file.write_text(text, encoding="utf-8"))

    def _write(self, key: str, suffix: str, write) -> None:
        with replaced(self._file(key, suffix)) as part:
            write(part)

    def picture(self, key: str) -> Image.Image | None:
        """The picture, or ``None``; PictureError for one that is damaged."""
        if not self.has(key, trajectory=False):
            return None
        return read_picture(self._file(key, _PICTURE), hint=_DELETE)

    def record(self, key: str) -> Record | None:
        """Its record, or ``None``; CompareError for one that is damaged."""
        file = self._file(key, _RECORD)
        if not file.is_file():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return Record(float(data["seconds"]), data["read"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged("record", file, error) from error

    def latents(self, key: str) -> torch.Tensor | None:
        """Latents after every step ``[steps, N, C]``, or ``None``; CompareError as above."""
        file = self._file(key, _LATENTS)
        if not file.is_file():
            return None
        try:
            return open_tensor_files(file).load()["latents"]
        except (CheckpointError, KeyError) as error:
            raise _damaged("latents", file, error) from error

    def merge(self, other: Path) -> int:
        """Copy what another store has and this one lacks, latents included; returns the number of
        pictures. CompareError where there is no such store or it holds no picture."""
        if not other.is_dir():
            raise CompareError("no such cache folder", file=other)
        records = sorted(other.glob(f"*/*{_RECORD}"))
        if not records:
            raise CompareError("no picture in the cache folder", file=other)
        copied = 0
        for record in records:
            key = record.stem
            if self.has(key, trajectory=record.with_suffix(_LATENTS).is_file()):
                continue
            make_folder(self._file(key, _RECORD).parent)
            for suffix in (_PICTURE, _LATENTS, _RECORD):  # the record last, as in save
                source = record.with_suffix(suffix)
                if source.is_file():
                    self._write(key, suffix, lambda part, source=source: shutil.copy(source, part))
            copied += 1
        return copied


def _damaged(what: str, file: Path, error: Exception) -> CompareError:
    return CompareError(f"damaged {what}: {error}", file=file, hint=_DELETE)


class Fingerprints:
    """SHA-256 of files and folders, remembered by path, size and modification time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            known = {}  # a missing or damaged cache is only slower
        self._known: dict[str, list] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """Hash of a file's bytes, or of a folder's model files with their names."""
        if path.is_file():
            return self._of_file(path)
        names = [p for p in sorted(path.rglob("*")) if p.suffix in _MODEL_FILES]
        if not names:
            raise CompareError("no model file in the folder", file=path)
        material = [[p.relative_to(path).as_posix(), self._of_file(p)] for p in names]
        return hashlib.sha256(json.dumps(material).encode()).hexdigest()

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        known = self._known.get(name)
        if isinstance(known, list) and known[:2] == stamp and _is_digest(known[2:]):
            return known[2]
        digest = hash_files([path])[0].sha256
        self._known[name] = [*stamp, digest]
        return digest

    def keep(self) -> None:
        """Write the memory back, whole or not at all."""
        with replaced(self._file) as part:
            part.write_text(json.dumps(self._known), encoding="utf-8")


def _is_digest(rest: list) -> bool:
    return len(rest) == 1 and isinstance(rest[0], str) and len(rest[0]) == 64


def picture_key(system: Mapping[str, object], settings: Mapping[str, object], case: Case) -> str:
    """SHA-256 over the fingerprints of a system, the settings and the case."""
    what = [case.prompt, case.seed, case.width, case.height]
    text = json.dumps([VERSION, system, settings, what], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
