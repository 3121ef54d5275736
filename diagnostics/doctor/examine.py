"""Examines a machine: its files against what a picture needs, its device against the levels."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from ...cards.sizes import copy_bytes, encoder_bytes
from ...checkpoint import EncoderCheckpoint
from ...checkpoint.encoder_writing import find_head, find_vision, head_beside, is_head
from ...checkpoint.level_order import AUTO, AUTO_ORDER, LEVELS, MIXED, capability
from ...checkpoint.levels import Catalogue, resolve
from ...checkpoint.listing import Listing
from ...checkpoint.pairs import Candidate, Pair, find_pair, residency
from ...checkpoint.published import PUBLISHED, Published
from ...errors import CheckpointError
from ...quant.provenance import hash_files
from ...quant.tables import gigabytes
from .comfyui import Host
from .known_files import known_files
from .machine import Device, find_device, ram, version_notes, versions
from .main_memory import bytes_held, bytes_in_memory, main_memory
from .recommend import recommend

_SIZE_TOLERANCE = 0.02  # published sizes are rounded


def examine(host: Host, *, sha256: bool = False) -> dict:
    """Everything the doctor knows, as plain data; ``missing`` lists what keeps pictures away.

    sha256: also reads every file found, whole, for its checksum.
    """
    files = known_files(host)
    folders, notes, listings = files.folders, files.notes, files.listings
    models, encoders, vaes, broken = files.models, files.encoders, files.vaes, files.broken
    device = find_device()
    pairs = {level: find_pair(level, models.candidates) for level in LEVELS}
    memory = ram()
    encoder = _encoder_in_memory(encoders)
    here = [level for level in LEVELS if level not in MIXED or pairs[level] is not None]
    levels = [_level(level, pairs[level], device, encoder, memory) for level in here]
    chosen = _auto(models, device)
    auto = chosen and _level(chosen.label, chosen, device, encoder, memory)
    expected = [_expected(item, listings[item.kind]) for item in PUBLISHED]
    order = AUTO_ORDER[capability(device.int8, device.bfloat16, device.fp4)]
    found = {
        "diffusion_models": [
            _file(c.name, c.path, c.header.level) | {"folded": _is_folded(c)}
            for c in models.candidates
        ],
        "text_encoders": [
            _file(name, path, encoder.level) | _writes(encoder, listings["text_encoders"])
            for name, path, encoder in encoders
        ],
        "vae": [_file(name, path, None) for name, path, _ in vaes],
    }
    if sha256:
        for file in (file for files in found.values() for file in files):
            file["sha256"] = _checksum(Path(file["path"]))
    return {
        "comfyui": {"root": str(host.root), "version": host.version, "python": str(host.python)},
        "versions": versions(),
        "this_python_is_comfyuis": _same_python(host.python),
        "device": asdict(device) | {"int8": device.int8, "ram": memory},
        "folders": folders,
        "found": found,
        "broken": broken,
        "expected": expected,
        "encoder_in_memory": encoder,
        "levels": levels,
        "auto": chosen and chosen.label,
        "auto_pair": auto,
        "recommended": recommend(levels, order, expected, bool(encoders), bool(vaes)),
        "missing": [
            *_missing([*pairs.values(), chosen], encoders, vaes, folders),
            *broken.values(),
        ],
        "notes": [
            *notes,
            *version_notes(versions()),
            *_short_of_memory(levels, auto, memory),
        ],
    }


def _file(name: str, path: Path, level: str | None) -> dict:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    size = sum(p.stat().st_size for p in files)
    return {"name": name, "path": str(path), "bytes": size, "level": level}


def _writes(encoder: EncoderCheckpoint, listing: Listing) -> dict:
    """Whether an encoder can write captions, and of pictures; in words what a damaged part has."""
    try:
        head = find_head(encoder) or head_beside(listing, encoder)
        sees = find_vision(encoder) is not None
    except CheckpointError as error:
        return {"writes": None, "sees": False, "writing_problem": str(error)}
    return {"writes": head and head.path.name, "sees": head is not None and sees}


def _is_folded(candidate: Candidate) -> bool:
    header = candidate.header
    return any(header.folding(copy) is not None for copy in header.copies)


def _checksum(path: Path) -> str | None:
    """SHA-256 of a file; None for a folder, which no page gives one for."""
    if path.is_dir():
        return None
    return hash_files([path])[0].sha256


def _expected(item: Published, listing: Listing) -> dict:
    """A published file and whether it is here, whole as far as its size tells."""
    names = (n for n in listing.names if n.rpartition("/")[2] == item.name)
    if item.use is not None:  # under whatever name: the published one says nothing
        names = (n for n in listing.names if is_head(listing.paths[n]))
    name = next(names, None)
    here = None if name is None else listing.paths[name].stat().st_size
    off = here and item.nbytes and abs(here / item.nbytes - 1) > _SIZE_TOLERANCE
    return asdict(item) | {
        "url": item.url,
        "folder": listing.roots[-1],
        "here": here is not None,
        "size_differs": bool(off),
    }


def _encoder_in_memory(encoders: list) -> int:
    """Bytes of the smallest encoder here, else of the one that most people have, at FP8."""
    found = [bytes_in_memory(encoder.entries.values(), 2) for _, _, encoder in encoders]
    return min(found, default=encoder_bytes("FP8"))


def _level(level: str, pair: Pair | None, device: Device, encoder: int, memory: int | None) -> dict:
    itemsize = 2 if device.bfloat16 else 4
    first, second = (copy_bytes(level),) * 2 if pair is None else pair.weight_bytes()
    fits = None if device.memory is None else residency((first, second), device.memory)
    if pair is None:
        copies, held = (copy_bytes(level, itemsize),) * 2, 0
    else:
        copies, held = _in_memory(pair, itemsize)
    memory_of = main_memory(copies, encoder, fits, device.type, held)
    return {
        "level": level,
        "copy_bytes": first,
        "unconditional_bytes": second,
        "on_this_device": fits,
        "ram_needed": memory_of.needed,
        "ram_at_speed": memory_of.at_speed,
        "fits_ram": None if memory is None else memory_of.at_speed <= memory,
        "conditional": pair and pair.conditional.name,
        "unconditional": pair and pair.unconditional and pair.unconditional.name,
        "one_branch": pair and pair.one_branch and pair.one_branch.reason,
    }


def _in_memory(pair: Pair, itemsize: int) -> tuple[tuple[int, int], int]:
    """Bytes of the two copies of found files, and of these what is not mapped."""
    entries = [
        [] if candidate is None else candidate.header.entries[copy].values()
        for candidate, copy in (
            (pair.conditional, "conditional"),
            (pair.unconditional, "unconditional"),
        )
    ]
    first, second = (bytes_in_memory(each, itemsize) for each in entries)
    return (first, second), sum(bytes_held(each, itemsize) for each in entries)


def _short_of_memory(levels: list[dict], row: dict | None, memory: int | None) -> list[str]:
    """What to do where what auto picks needs more main memory than there is."""
    if row is None or row["fits_ram"] is not False:
        return []
    fitting = [r["level"] for r in levels if r["fits_ram"]]
    way = f"take {fitting[-1]}" if fitting else "use one copy alone (no guidance)"
    short = row["ram_needed"] > memory
    what = "needs" if short else "reads its weights from the disk again and again below"
    amount = gigabytes(row["ram_needed" if short else "ram_at_speed"])
    so = "it will swap or end" if short else "it will be slow"
    return [
        f"{row['level']} {what} {amount} of main memory and this machine has "
        f"{gigabytes(memory)}: {so}. {way[0].upper()}{way[1:]}, a smaller encoder (a GGUF at 4 "
        f"bits){', or enlarge the swap file' if short else ''}."
    ]


def _auto(models: Catalogue, device: Device) -> Pair | None:
    """The files that auto picks here from those found; None without any."""
    order = AUTO_ORDER[capability(device.int8, device.bfloat16, device.fp4)]
    try:
        return resolve(AUTO, models, order, device.memory or 0)
    except CheckpointError:
        return None


def _missing(pairs: list[Pair | None], encoders: list, vaes: list, folders: dict) -> list[str]:
    """What to download, for people."""
    found = [pair for pair in pairs if pair is not None]
    lines = []
    if not found:
        lines.append(f"no Ideogram 4 model: put both copies into {folders['diffusion_models'][-1]}")
    elif not any(pair.complete for pair in found):
        levels = ", ".join(dict.fromkeys(pair.level for pair in found))
        lines.append(f"no unconditional copy beside the conditional one ({levels}): no guidance")
    elif all(pair.conditional.header.linears_only for pair in found):
        lines.append(
            "your model holds linears only: download a complete one (FP8 or BF16) beside it, and "
            "pick that as base_file in the loader"
        )
    if not encoders:
        where = folders["text_encoders"][-1]
        lines.append(f"no text encoder: put a Qwen3-VL-8B file into {where}")
    if not vaes:
        lines.append(f"no VAE: put flux2-vae.safetensors into {folders['vae'][-1]}")
    return lines


def _same_python(python: Path) -> bool:
    # the environment counts, not the binary that its link leads to
    return Path(sys.prefix).resolve() == python.parent.parent.resolve() or (
        python.absolute() == Path(sys.executable).absolute()
    )
