"""The versions of what makes a picture, for its key."""

from __future__ import annotations

import importlib.metadata

import torch

from ...ops.dispatch import reports
from ...version import __version__

#: Libraries that every picture goes through: the encoder's tokenizer, parts of the pipeline.
_ALWAYS = ("diffusers", "transformers")
#: Backend -> the packages it comes in, of which one is installed.
_BACKENDS = {"triton": ("triton", "triton-windows"), "comfy_kitchen": ("comfy-kitchen",)}


def versions_used(device: str) -> dict[str, str]:
    """Package -> version: this pack, torch, and the backends that work on ``device``.

    A backend that is installed and does not run there leaves no trace in a picture, so it is not
    among them.
    """
    working = {report.name for report in reports(device) if report.available}
    names = [*_ALWAYS, *(p for b in _BACKENDS if b in working for p in _BACKENDS[b])]
    found = {"ideogram4-quant": __version__, "torch": str(torch.__version__)}
    return found | {name: version for name in names if (version := _installed(name)) is not None}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
