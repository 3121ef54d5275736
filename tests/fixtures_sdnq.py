"""Folders as SDNQ writes them, by its formulas: independent of the package's reader and of sdnq."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ideogram4_quant.tests import fixtures_files as files

GROUP = 64  # of sdnq's uint4
HADAMARD = 128
CONFIGS = {
    "uint4": {"use_hadamard": True, "hadamard_group_size": HADAMARD},
    "int8": {"use_hadamard": False, "hadamard_group_size": 256},
}
LEVELS = {"SDNQ 4-bit": "uint4", "SDNQ 8-bit": "int8"}


def hadamard(order: int) -> np.ndarray:
    """Regular (Kronecker powers of an H4) for powers of 4, else Sylvester's: entry (i, j) is -1 to
    the number of bits that i and j share."""
    if order.bit_length() % 2:
        matrix = np.ones((1, 1))
        while len(matrix) < order:
            matrix = np.kron(matrix, 1.0 - 2.0 * np.eye(4)[::-1])
        return matrix / np.sqrt(order)
    shared = np.arange(order)[:, None] & np.arange(order)
    bits = np.array([[value.bit_count() for value in row] for row in shared.tolist()])
    return (1.0 - 2.0 * (bits % 2)) / np.sqrt(order)


def turn(values: np.ndarray, group: int) -> np.ndarray:
    """float64: each run of ``group`` values of a row times the matrix."""
    return (values.reshape(-1, group) @ hadamard(group)).reshape(values.shape)


def pack(weight: torch.Tensor, dtype: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors by suffix, the values that they stand for): ``uint4`` rotated, or ``int8``."""
    w = weight.double().numpy()
    rows, columns = w.shape
    if dtype == "int8":
        scale = np.maximum(np.abs(w).max(1, keepdims=True) / 127, 1e-12).astype(np.float32)
        codes = np.clip(np.round(w / scale), -128, 127).astype(np.int8)
        parts = {"weight": torch.from_numpy(codes), "scale": torch.from_numpy(scale)}
        return parts, torch.from_numpy(codes * scale.astype(np.float64)).float()
    order = HADAMARD
    while columns % order:
        order //= 2
    group = columns if columns % GROUP else GROUP
    grouped = turn(w, order).reshape(rows, columns // group, group)
    low = grouped.min(2, keepdims=True).astype(np.float32)
    scale = np.maximum((grouped.max(2, keepdims=True) - low) / 15, 1e-12).astype(np.float32)
    codes = np.clip(np.round((grouped - low) / scale), 0, 15).astype(np.uint8)
    values = turn((codes * scale.astype(np.float64) + low).reshape(rows, columns), order)
    pairs = codes.reshape(-1, 2)
    parts = {
        "weight": torch.from_numpy(pairs[:, 0] | pairs[:, 1] << 4),
        "scale": torch.from_numpy(scale),
        "zero_point": torch.from_numpy(low),
    }
    return parts, torch.from_numpy(values).float()


def config(dtype: str, **changes: object) -> dict[str, object]:
    """``quantization_config.json`` of a folder whose weights are all of ``dtype``."""
    said = {
        "quant_method": "sdnq",
        "weights_dtype": dtype,
        "sdnq_version": "0.2.8",
        **CONFIGS[dtype],
    }
    return {**said, "modules_dtype_dict": {}, "modules_quant_config": {}, **changes}


def save(
    folder: Path,
    stored: dict[str, torch.Tensor],
    said: dict[str, object],
    metadata: dict[str, str] | None = None,
) -> Path:
    """A folder with one model, and ``said`` as its config; returns the folder."""
    files.save(folder / "diffusion_pytorch_model.safetensors", stored, metadata)
    (folder / "quantization_config.json").write_text(json.dumps(said))
    return folder
