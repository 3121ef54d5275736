"""The device that would compute, and the versions of what computes on it."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...ops.dispatch import BackendReport, reports

PACKAGES = ("torch", "triton", "triton-windows", "comfy-kitchen", "safetensors", "numpy")
_BFLOAT16_FROM = (8, 0)  # Ampere; earlier cards emulate it
_FP4_FROM = (10, 0)


@dataclass(frozen=True)
class Device:
    """memory: bytes, None where nothing tells. bfloat16: whether products run in it; fp4: and in
    NVFP4 and MXFP8.
    """

    type: str
    name: str
    memory: int | None
    bfloat16: bool
    backends: tuple[BackendReport, ...]
    fp4: bool = False

    @property
    def int8(self) -> bool:
        """Whether an int8 backend beside the formulas works here."""
        return any(b.available and b.name != "reference" for b in self.backends)


#: The first comfy-kitchen with 6-bit codes; 0.2.31 takes them for 4-bit ones.
_SIX_BITS_FROM = (0, 2, 40)


def version_notes(found: Mapping[str, str | None]) -> list[str]:
    """What a version in ``found`` cannot do with files that are in use, a line each."""
    version = found.get("comfy-kitchen")
    if version is None or _release(version) >= _SIX_BITS_FROM:
        return []
    return [
        f"comfy-kitchen {version}: ComfyUI's own loader needs 0.2.40 or newer for W6A8 "
        '(asym_w4a8_int8 with 6-bit codes); this one stops with "s_rel must have shape"'
    ]


def _release(version: str) -> tuple[int, ...]:
    """``0.2.40.post1`` -> (0, 2, 40)."""
    numbers = itertools.takewhile(str.isdigit, version.partition("+")[0].split("."))
    return tuple(map(int, numbers))


def find_device() -> Device:
    """The accelerator that torch sees, else the CPU."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = (properties.major, properties.minor)
        return Device(
            "cuda",
            properties.name,
            properties.total_memory,
            found >= _BFLOAT16_FROM,
            reports("cuda"),
            fp4=found >= _FP4_FROM and not torch.version.hip,
        )
    if torch.backends.mps.is_available():
        return _device("mps", "Apple GPU, which shares the RAM", ram(), True)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        properties = torch.xpu.get_device_properties(0)
        return _device("xpu", properties.name, properties.total_memory, True)
    return _device("cpu", platform.processor() or platform.machine(), ram(), False)


def _device(kind: str, name: str, memory: int | None, bfloat16: bool) -> Device:
    return Device(kind, name, memory, bfloat16, reports(kind))


def ram() -> int | None:
    """Bytes of the machine's memory; None where neither psutil nor the system tells."""
    try:
        import psutil  # ComfyUI brings it

        return psutil.virtual_memory().total
    except ImportError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def versions() -> dict[str, str | None]:
    """Package -> its version in this Python; None where it is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["triton-windows"] is not None:
        found["triton"] = found["triton"] or found["triton-windows"]
    del found["triton-windows"]
    return found
