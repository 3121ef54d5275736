"""What lies beside a model's weights in a folder and tells of them."""

from __future__ import annotations

import re
from typing import Any

from .tensor_files import TensorFiles, read_json

_DIFFUSERS = re.compile(r"diffusion_pytorch_model[.-]")  # one file, the first of many, an index


def config_beside(tensor_files: TensorFiles) -> dict[str, Any] | None:
    """``config.json`` in the folder of a safetensors file, if it is of such a model."""
    beside = tensor_files.path.parent / "config.json"
    if tensor_files.kind != "safetensors" or not beside.is_file():
        return None
    values = read_json(beside)
    return values if "Ideogram4" in str(values.get("_class_name")) else None


def told_beside(tensor_files: TensorFiles) -> dict[str, Any] | None:
    """What lies beside the weights to tell of them: their config, or one that names no class.

    Only where the weights have diffusers' name is a folder their own.
    """
    config = config_beside(tensor_files)
    if config is not None or not _DIFFUSERS.match(tensor_files.path.name):
        return config
    beside = tensor_files.path.parent / "config.json"
    values = read_json(beside) if beside.is_file() else {}
    return None if "_class_name" in values else values
