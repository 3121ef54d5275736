"""Where a file comes from, in its own metadata: source hash, licence, recipe, version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.attention_wish import WISH_KEY, told_name
from ..checkpoint.branches import GUIDANCE_KEY, GUIDANCE_NONE, PRESET_KEY, OneBranch
from ..errors import CheckpointError
from ..files.pieces import pieces
from ..version import __version__
from .plan import TensorPlan, rounding_of
from .recipes import PACKED_BITS, PACKED_GROUP, QuantOptions, Recipe

TOOL = f"ideogram4-quant {__version__}"

# Where safetensors, modelspec and GGUF files put it.
_GROUP_SCALE = f"least squares over {PACKED_GROUP} columns, e4m3, over one per output channel"
_ROW_SCALE = "absmax / 127 per output channel"
_SCALES = {
    **dict.fromkeys(PACKED_BITS, _GROUP_SCALE),
    "W4A4": "the least squared error of an output channel",
}
_LICENCE_KEYS = ("license", "licence", "general.license", "modelspec.license", "license_name")

MODEL_TYPES = {"conditional": "ideogram4_cond", "unconditional": "ideogram4_uncond"}
"""``model_type`` of a file with one copy, as Comfy-Org's files say it."""


@dataclass(frozen=True)
class SourceFile:
    """Name (without folders), size in bytes and SHA-256 in hex of a file that was read."""

    name: str
    size: int
    sha256: str


def hash_files(
    paths: Iterable[Path], advance: Callable[[int], None] = lambda count: None
) -> tuple[SourceFile, ...]:
    """SHA-256 of every file, read in pieces; ``advance`` is told how many bytes were read.

    Raises CheckpointError, naming the file, if one cannot be read.
    """
    found = []
    for path in paths:
        digest = hashlib.sha256()
        size = 0
        try:
            with open(path, "rb") as file:
                for piece in pieces(file):
                    digest.update(piece)
                    size += len(piece)
                    advance(len(piece))
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", file=path
            ) from error
        found.append(SourceFile(Path(path).name, size, digest.hexdigest()))
    return tuple(found)


def combined_hash(files: Sequence[SourceFile]) -> str:
    """The file's SHA-256; of several files: the hash of their hashes, in their order."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def licence_of(metadata: Mapping[str, object], options: QuantOptions) -> str | None:
    """The licence that the source names, else the one of the options."""
    for key in _LICENCE_KEYS:
        value = metadata.get(key)
        if isinstance(value, str) and value.strip():
            return value
    return options.licence


def recipe_record(
    recipe: Recipe, container: str, options: QuantOptions, plans: Sequence[TensorPlan]
) -> dict[str, object]:
    """The recipe as it was carried out, JSON-ready."""
    several = len({plan.copy for plan in plans}) > 1

    def names(chosen: Iterable[TensorPlan]) -> list[str]:
        return [f"{p.copy}.{p.module}" if several else p.module for p in chosen]

    def others() -> dict[str, list[str]]:
        quantized = (p for p in plans if p.quantized)
        return _by_label((p for p in quantized if p.encoding.label != recipe.weight_type), names)

    led = any(plan.quantized and plan.inputs is not None for plan in plans)
    record: dict[str, object] = {
        "level": recipe.level,
        "container": container,
        "type": recipe.weight_type,
        "protected": names(p for p in plans if p.protected),
    }
    if options.calibration is not None and options.calibration.path is not None:
        record["calibration_sha256"] = hash_files([options.calibration.path])[0].sha256
    if led:
        record["rounding"] = rounding_of(options)
    if recipe.file_format == "safetensors":
        record["scale"] = _SCALES.get(recipe.weight_type, _ROW_SCALE)
        if options.storage is not None:
            mixed = {"INT8": _ROW_SCALE, "W4A4": _SCALES["W4A4"], "others": _GROUP_SCALE}
            record["scale"] = "; ".join(f"{name}: {scale}" for name, scale in mixed.items())
        record["rotation"] = recipe.rotation
        record["smoothed"] = names(
            p for p in plans if getattr(p.encoding, "smooth", None) is not None
        )
        chosen = [plan for plan in plans if plan.choice is not None]
        if chosen:
            reasons = [plan.choice.reason for plan in chosen]
            record["treatments"] = dict(zip(names(chosen), reasons, strict=True))
        if recipe.finer:
            record["other_types"] = others()
    else:
        record["types"] = [[rule.pattern, rule.qtype] for rule in options.types]
        if options.storage is None:
            record["other_types"] = others()
        record["scales"] = "least output error on calibrated inputs" if led else "least error"
    if options.storage is not None:
        record["storage"] = _by_label((p for p in plans if p.linear), names)
        record["prediction"] = dict(options.prediction or {})
    return record


def _by_label(
    plans: Iterable[TensorPlan], names: Callable[[Iterable[TensorPlan]], list[str]]
) -> dict[str, list[str]]:
    """How linears are stored -> which."""
    found: dict[str, list[TensorPlan]] = {}
    for plan in plans:
        found.setdefault(plan.encoding.label, []).append(plan)
    return {label: names(some) for label, some in found.items()}


@dataclass(frozen=True)
class Provenance:
    """Everything that goes into the metadata; nothing in it depends on the clock or the machine."""

    copies: tuple[str, ...]
    config: Mapping[str, object]
    recipe: Mapping[str, object]
    sources: tuple[SourceFile, ...]
    source_level: str
    licence: str | None
    one_branch: OneBranch | None = None
    attention: str | None = None  # the source's wish, by this pack's name

    def _common(self) -> dict[str, str]:
        sources = [file.__dict__ for file in self.sources]
        mark = {} if self.one_branch is None else {GUIDANCE_KEY: GUIDANCE_NONE}
        if self.one_branch is not None and self.one_branch.preset is not None:
            mark[PRESET_KEY] = self.one_branch.preset
        if self.attention is not None:
            mark[WISH_KEY] = told_name(self.attention)
        return {
            **mark,
            "config": _json(self.config),
            "quantization": _json(self.recipe),
            "source": _json(sources),
            "source_sha256": combined_hash(self.sources),
            "source_level": self.source_level,
            "software": TOOL,
        }

    def safetensors(self) -> dict[str, str]:
        """``__metadata__`` of a safetensors file."""
        single = MODEL_TYPES[self.copies[0]] if len(self.copies) == 1 else "ideogram4"
        metadata = {"format": "pt", "model_type": single, **self._common()}
        if self.licence:
            metadata["license"] = self.licence
        return metadata

    def gguf(self, recipe: Recipe) -> dict[str, str | int]:
        """GGUF metadata; the general keys are those of the GGUF specification."""
        metadata: dict[str, str | int] = {
            "general.architecture": "ideogram4",
            "general.type": "model",
            "general.name": f"Ideogram 4 {self.copies[0]} {recipe.level}",
            "general.quantization_version": 2,
        }
        if recipe.file_type is not None:
            metadata["general.file_type"] = recipe.file_type
        if self.licence:
            metadata["general.license"] = self.licence
        metadata["ideogram4.copy"] = self.copies[0]
        prefix = "ideogram4."
        common = {key.removeprefix(prefix): value for key, value in self._common().items()}
        return metadata | {prefix + key: value for key, value in common.items()}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
