"""A calibration as one safetensors file: written whole, read with every value checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import RawTensor
from ..checkpoint.safetensors_header import parse_json, read_safetensors_header
from ..checkpoint.writers import write_safetensors
from ..errors import CheckpointError
from .calibration_run import Run
from .errors import CalibrationError
from .input_moments import DIRECTIONS
from .layer_stats import LayerStats

FORMAT = "ideogram4-quant calibration"
VERSION = "3"
READABLE = ("2", VERSION)
"""Version 2 has no blocks of moments: codes are rounded with its sketch alone."""

Contents = tuple[dict[str, LayerStats], tuple[float, ...], tuple[Run, ...]]
"""Layers, times and provenance of a calibration."""

_MAX_COLUMNS = 4096
_MAX_CANDIDATES = 256
_MAX_FEATURES = 1 << 20
_MAX_TOKENS = 1 << 40
_MAX_SQUARE = 1e30  # mean square of an input: the outputs' must fit fp32
_BLOCK_TOLERANCE = 1e-3  # of sums in fp32, and on some devices of products in fewer bits
_BLOCKS = "blocks"  # optional: fp32 [G, B, B]
_UNMEASURED = -1.0  # in a row of "noise": sums of squares are never negative

# Field -> (safetensors dtype, shape as a function of K, columns and candidates, may be negative)
_FIELDS: dict[str, tuple[str, Callable[[int, int, int], tuple[int, ...]], bool]] = {
    "shape": ("I64", lambda k, s, c: (2,), False),
    "tokens": ("I64", lambda k, s, c: (1,), False),
    "absmax": ("F32", lambda k, s, c: (k,), False),
    "square_sum": ("F64", lambda k, s, c: (k,), False),
    "sketch": ("F32", lambda k, s, c: (k, DIRECTIONS), True),
    "weight_absmax": ("F32", lambda k, s, c: (k,), False),
    "power_sums": ("F64", lambda k, s, c: (4,), True),
    "peaks": ("F64", lambda k, s, c: (3, s), False),
    "signal": ("F64", lambda k, s, c: (s,), False),
    "noise": ("F64", lambda k, s, c: (c, s), True),
}


def write_calibration(
    path: str | os.PathLike[str],
    layers: Mapping[str, LayerStats],
    times: Sequence[float],
    runs: Sequence[Run],
    candidates: Sequence[str],
    *,
    overwrite: bool = False,
) -> int:
    """See ``Calibration.save``; ``candidates``: every treatment that a layer was measured with."""
    tensors = {}
    for key, stats in layers.items():
        unmeasured = torch.full_like(stats.signal, _UNMEASURED)
        rows = [stats.noise.get(name, unmeasured) for name in candidates]
        fields = {
            "shape": torch.tensor(stats.shape),
            "tokens": torch.tensor([stats.tokens]),
            "noise": torch.stack(rows) if rows else stats.signal.new_zeros(0, len(stats.signal)),
        }
        for name in _FIELDS:
            tensors[f"{key}.{name}"] = fields[name] if name in fields else getattr(stats, name)
        if stats.blocks is not None:
            tensors[f"{key}.{_BLOCKS}"] = stats.blocks
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "times": json.dumps(times),
        "candidates": json.dumps(candidates),
        "provenance": json.dumps([asdict(run) for run in runs]),
    }
    return write_safetensors(path, tensors, metadata, overwrite=overwrite)


def read_calibration(path: str | os.PathLike[str]) -> Contents:
    """What ``Calibration.load`` makes a calibration of."""
    path = Path(path)
    try:
        _, tensors, metadata = read_safetensors_header(path)
        return _read(path, tensors, metadata)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=path) from error


def _read(path: Path, tensors: dict[str, RawTensor], metadata: dict[str, str]) -> Contents:
    if metadata.get("format") != FORMAT or metadata.get("version") not in READABLE:
        raise CalibrationError(
            "this is no calibration that is read here",
            file=path,
            found=f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"[:120],
            needed=f"{FORMAT!r}, version {VERSION!r}",
            hint="Make one with ideogram4-quant calibrate.",
        )
    times = _list(path, metadata, "times", float, _MAX_COLUMNS)
    candidates = _list(path, metadata, "candidates", str, _MAX_CANDIDATES)
    if list(times) != sorted(set(times)):
        raise CalibrationError("the times do not rise", file=path, found=str(times)[:120])
    runs = tuple(_run(path, entry) for entry in _list(path, metadata, "provenance", dict, 10_000))
    by_layer: dict[str, dict[str, RawTensor]] = {}
    for name, raw in tensors.items():
        key, _, part = name.rpartition(".")
        by_layer.setdefault(key, {})[part] = raw
    layers = {
        key: _layer(path, key, parts, len(times), candidates)
        for key, parts in sorted(by_layer.items(), key=lambda item: _natural(item[0]))
    }
    return layers, times, runs


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(p), "") if p.isdecimal() and len(p) < 10 else (-1, p) for p in key.split(".")]


def _layer(
    path: Path, key: str, parts: dict[str, RawTensor], columns: int, candidates: tuple[str, ...]
) -> LayerStats:
    def bad(what: str, found: object, needed: object) -> CalibrationError:
        return CalibrationError(what, file=path, tensor=key, found=found, needed=needed)

    copy, _, module = key.partition(".")
    if copy not in ("conditional", "unconditional") or not module:
        raise bad("no name of a linear", repr(key)[:80], "conditional.MODULE, unconditional.MODULE")
    blocks = parts.pop(_BLOCKS, None)
    if parts.keys() != _FIELDS.keys():
        odd = sorted(parts.keys() ^ _FIELDS.keys())
        raise bad("fields are missing or unknown", ", ".join(odd)[:120], ", ".join(_FIELDS))
    features = parts["absmax"].shape[-1] if parts["absmax"].shape else 0
    if not 0 < features <= _MAX_FEATURES:
        raise bad("impossible number of input channels", features, f"1 to {_MAX_FEATURES}")
    values: dict[str, Tensor] = {}
    for name, (dtype, shape_of, signed) in _FIELDS.items():
        raw, shape = parts[name], shape_of(features, columns, len(candidates))
        if raw.dtype != dtype or raw.shape != shape:
            raise bad(
                f"{name} does not fit", f"{raw.dtype} {list(raw.shape)}", f"{dtype} {list(shape)}"
            )
        values[name] = raw.read()
        if not bool(values[name].isfinite().all()):
            raise bad(f"{name} holds NaN or infinity", "no numbers", "finite numbers")
        if not signed and bool((values[name] < 0).any()):
            raise bad(f"{name} is negative", values[name].min().item(), "no negative number")
    shape = tuple(values.pop("shape").tolist())
    if shape[1] != features or shape[0] < 1:
        raise bad("the shape contradicts the statistics", list(shape), f"[N, {features}]")
    tokens = values.pop("tokens").item()
    if not 0 < tokens <= _MAX_TOKENS:
        raise bad("impossible number of tokens", tokens, f"1 to {_MAX_TOKENS}")
    loudest = values["square_sum"].max().item() / tokens
    if loudest > _MAX_SQUARE:
        raise bad("impossible mean square of an input", f"{loudest:g}", f"at most {_MAX_SQUARE:g}")
    noise = dict(zip(candidates, values.pop("noise"), strict=True))
    values[_BLOCKS] = None if blocks is None else _blocks(blocks, values["square_sum"], bad)
    return LayerStats(
        shape=shape,
        tokens=tokens,
        noise={name: row for name, row in noise.items() if bool((row >= 0).all())},
        **values,
    )


def _blocks(
    raw: RawTensor, square_sum: Tensor, bad: Callable[[str, object, object], CalibrationError]
) -> Tensor:
    """The blocks of the moments, whose diagonals are the sums of squares."""
    features = len(square_sum)
    width = raw.shape[-1] if len(raw.shape) == 3 else 0
    if not 0 < width <= features or raw.shape != (-(-features // width), width, width):
        raise bad("blocks do not fit", list(raw.shape), f"[G, B, B] of {features} inputs")
    if raw.dtype != "F32":
        raise bad("blocks do not fit", raw.dtype, "F32")
    blocks = raw.read()
    diagonal = blocks.diagonal(dim1=1, dim2=2).reshape(-1)[:features].double()
    if not bool(blocks.isfinite().all()):
        raise bad("blocks hold NaN or infinity", "no numbers", "finite numbers")
    off = (diagonal - square_sum).abs() > _BLOCK_TOLERANCE * square_sum.max()
    if bool(off.any()):
        raise bad("blocks contradict square_sum", diagonal[off][0].item(), "equal diagonals")
    return blocks


def _list(path: Path, metadata: dict[str, str], key: str, kind: type, limit: int) -> tuple:
    """The JSON list in a metadata value, its items all of ``kind``."""
    text = '{"value": ' + metadata.get(key, "") + "}"
    value = parse_json(text.encode(), path, f"metadata {key}").get("value")
    items = value if isinstance(value, list) else None
    kinds = (float, int) if kind is float else (kind,)
    usable = items is not None and len(items) <= limit and all(type(i) in kinds for i in items)
    if not usable or (kind is float and not all(map(_is_float, items))):
        raise CalibrationError(
            f"metadata {key} is not usable",
            file=path,
            found=repr(value)[:80],
            needed=f"a list of at most {limit} {kind.__name__}",
        )
    return tuple(kind(item) for item in items)


def _is_float(value: float) -> bool:
    """Whether a number is finite, and no integer beyond floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _run(path: Path, entry: dict[str, Any]) -> Run:
    def pairs(key: str) -> dict[str, str]:
        found = entry.get(key)
        if not isinstance(found, dict) or not all(type(v) is str for v in found.values()):
            raise CalibrationError(f"provenance without {key}", file=path, found=repr(found)[:80])
        return dict(found)

    try:
        return Run(
            models=pairs("models"),
            prompts_sha256=str(entry["prompts_sha256"]),
            seeds=tuple(int(seed) for seed in entry["seeds"]),
            versions=pairs("versions"),
            **{name: int(entry[name]) for name in ("prompts", "steps", "width", "height")},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CalibrationError("provenance is not usable", file=path, found=repr(error)) from error
