"""Measurements on disk: one small JSON file a folder, device and set of versions.

Everything that may change which candidate is fastest is part of the file's name, so an update of
this pack, its tilings, the driver, torch, Triton or comfy-kitchen starts a new file. A file that
cannot be read as what it should be is measured anew; writing goes through ``new_file``, so two
processes never see half of one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ...files.new_file import WriteError, new_file
from ...version import __version__
from ..kernels.configs import table_digest
from .choices import ATTENTION, FUSED, GGUF, LINEAR, Key, Measurement, Table, named

logger = logging.getLogger(__name__)

# Raised where the meaning of a measurement changes.
_SCHEMA = 3
_MAX_BYTES = 1 << 22
_PREFIX = "measured"
# What a document of another form ends in; OverflowError: an integer beyond floats.
_UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_LARGEST = 1 << 31  # of a weight's sizes and of token counts


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement depends on: device, driver, and the versions of what computes.

    A device has its index: two cards of one name may sit in slots, or get air, of two kinds.
    """
    device = named(device)
    about = {
        "schema": str(_SCHEMA),
        "pack": __version__,
        "tilings": table_digest(),
        "torch": str(torch.__version__),
        "triton": _version("triton", "triton-windows"),
        "comfy_kitchen": _version("comfy-kitchen"),
        "system": platform.system(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return about | {
            "device": properties.name,
            "index": str(device.index),
            "processors": str(properties.multi_processor_count),
            "memory": str(properties.total_memory),
            "driver": _cuda_driver(),
        }
    if device.type != "cpu":
        return about | {
            "device": f"{device.type} {platform.machine()}",
            "index": str(device.index or 0),
            "driver": "unknown",
        }
    return about | {
        "device": f"cpu {platform.machine()} {_processor()}".strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def file_for(folder: Path, device: torch.device) -> Path:
    """Where the measurements of this device under these versions lie in ``folder``."""
    about = environment(device)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")[:40]
    return folder / f"{_PREFIX}-{name}-{digest}.json"


def load(folder: Path, device: torch.device) -> Table:
    """The measurements kept in ``folder``; an empty table where there are none or they are broken.

    A broken file is reported once by a warning; the next ``save`` replaces it.
    """
    path = file_for(folder, device)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        return Table(_measurement(entry) for entry in document["measurements"])
    except FileNotFoundError:
        return Table()
    except (OSError, *_UNUSABLE) as error:
        logger.warning("%s: cannot be read (%s): measuring again", path, error)
        return Table()


def save(folder: Path, device: torch.device, table: Table) -> None:
    """Keep ``table``, beside what another process may have written meanwhile.

    A folder that cannot be written is reported by a warning: then every start measures again.
    """
    path = file_for(folder, device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        merged = load(folder, device).with_added(table)
        entries = [
            {
                **asdict(m.key),
                "seconds": dict(m.seconds),
                "errors": dict(m.errors),
                "estimated": sorted(m.estimated),
            }
            for m in merged
        ]
        document = {"about": environment(device), "measurements": entries}
        data = (json.dumps(document, indent=1) + "\n").encode()
        with new_file(path, len(data), overwrite=True) as file:
            file.write_at(0, data)
    except (OSError, WriteError) as error:
        logger.warning("the measured choices are not kept: %s", error)


_KEY_TYPES = {field.name: int if field.type == "int" else str for field in fields(Key)}


def _measurement(entry: Any) -> Measurement:
    """One entry of a file; ValueError and its like for anything that ``save`` does not write."""
    values = {name: entry[name] for name in _KEY_TYPES}
    for name, value in values.items():
        if type(value) is not _KEY_TYPES[name]:
            raise ValueError(f"{name} is {value!r}")
    key = Key(**values)
    sizes = (key.n, key.k, key.tokens)
    if key.op not in (LINEAR, GGUF, ATTENTION, FUSED) or min(sizes) < 1 or max(sizes) > _LARGEST:
        raise ValueError(f"no such measurement: {key}")
    seconds, errors = _figures(entry["seconds"]), _figures(entry["errors"])
    if not seconds or min(seconds.values()) <= 0:
        raise ValueError(f"no times for {key}")
    estimated = frozenset(entry["estimated"])
    if not estimated <= seconds.keys():
        raise ValueError(f"no times for {sorted(estimated - seconds.keys())} of {key}")
    return Measurement(key, seconds, errors, estimated)


def _figures(values: Any) -> dict[str, float]:
    figures = {str(name): float(value) for name, value in values.items()}
    if not all(math.isfinite(value) for value in figures.values()):
        raise ValueError(f"not finite: {figures}")
    return figures


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _cuda_driver() -> str:
    """The CUDA version of the driver, as torch reads it; ROCm has none to ask for."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"HIP {torch.version.hip}" if torch.version.hip or ask is None else str(ask())


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor()
