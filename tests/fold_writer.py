"""Writes folded files, as releases before 0.2.0 did, for tests of the readers that undo them.

SmoothQuant (arXiv 2211.10438) divides a linear's input by ``s`` and multiplies its columns by it;
in a folded file the division lies in what makes the input: a norm's weight, the v rows of qkv, the
rows of w3. The ``fold.*`` tensors record what was done.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.folding import Folding, sites
from ideogram4_quant.gguf_loader import GGUFSpec, read_header, write_gguf
from ideogram4_quant.quant import Calibration, QuantOptions, quantize_checkpoint
from ideogram4_quant.quant.treatments import rotation_group, smoothing

ALPHA = 0.5
_GGML_TYPES = {torch.float32: 0, torch.int32: 26}


def write_folded(
    source: Path,
    level: str,
    out: Path,
    calibration: Calibration,
    *,
    protect: Collection[str] = (),
    consumers: str = "*",
) -> Folding:
    """Quantize the conditional copy in ``source`` with its inputs smoothed by folding.

    Linears in ``protect`` stay in bf16; ``consumers`` is the pattern of linears whose input is
    folded. Where INT8 weights are not rotated anyway, the input of attention.o is.
    """
    checkpoint = open_checkpoint(source)
    weights = checkpoint.load("conditional", dtype=torch.float32)
    norms = torch.float32 if out.suffix == ".gguf" else torch.bfloat16
    rotates = level == "INT8 W8A8"
    head_dim = checkpoint.config.attention_head_dim
    folding = _folding(weights, calibration, norms, head_dim, rotates, protect, consumers)
    unquantized = out.with_suffix(".f32.safetensors")
    changed = {n: fold_tensor(n, t, folding).contiguous() for n, t in weights.items()}
    config = json.dumps(checkpoint.config.to_dict())
    save_file(changed, unquantized, {"model_type": "ideogram4_cond", "config": config})
    options = QuantOptions(protect=tuple(protect))
    quantize_checkpoint(unquantized, level, out, copy="conditional", options=options)
    unquantized.unlink()
    _add_record(out, folding)
    return folding


def fold_tensor(name: str, tensor: Tensor, folding: Folding) -> Tensor:
    """One canonical tensor in the folded basis: the same object where nothing is folded into it."""
    weight = name.endswith(".weight")
    fold = folding.of(name.removesuffix(".weight"), len(tensor)) if weight else None
    if fold is None:
        return tensor
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    return fold.fold(tensor.reshape(len(tensor), -1)).reshape(tensor.shape)


def remaining_factor(
    norm_weight: Tensor, factors: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``n / round(n / s)``: what a norm's weight ``n`` [K] takes of ``s`` once stored in ``dtype``.

    fp32 [K], positive. The linear's columns are multiplied by this and not by ``s``, so that the
    rounding of the norm costs nothing. Where the weight is 0 or would become 0 the factor is 1.
    """
    true, rounded = norm_weight.double(), (norm_weight.double() / factors).to(dtype).double()
    usable = (true != 0) & (rounded != 0) & rounded.isfinite()
    return torch.where(usable, true / torch.where(usable, rounded, 1.0), 1.0).float()


def _folding(
    weights: Mapping[str, Tensor],
    calibration: Calibration,
    norm_dtype: torch.dtype,
    head_dim: int,
    rotates: bool,
    protect: Collection[str],
    pattern: str,
) -> Folding:
    smooth: dict[str, Tensor] = {}
    rotation: dict[str, int] = {}
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    for site in sites(len(layers)):
        quantized = [c for c in site.consumers if c not in protect and c.startswith("layers.")]
        if not quantized or not any(fnmatchcase(c, pattern) for c in site.consumers):
            continue
        members = [calibration.layer("conditional", c) for c in site.consumers]
        vector = smoothing(members, ALPHA).double()
        if "norm" in site.producer:
            vector = remaining_factor(weights[f"{site.producer}.weight"], vector, norm_dtype)
        smooth |= dict.fromkeys(site.consumers, vector.float())
        if rotates and site.rotates:
            rotation |= dict.fromkeys(site.consumers, rotation_group(head_dim, head_dim))
    return Folding(smooth, rotation)


def _record(folding: Folding) -> Iterator[tuple[str, Tensor]]:
    """The ``fold.*`` tensors of a file: F32 [K] vectors and I32 [1] groups."""
    for module, vector in folding.smooth.items():
        yield f"fold.{module}.smooth", vector.float().clone()
    for module, group in folding.rotation.items():
        yield f"fold.{module}.rotation", torch.tensor([group], dtype=torch.int32)


def _add_record(path: Path, folding: Folding) -> None:
    record = dict(_record(folding))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() | {"lora_basis": "folded"}
        save_file(load_file(path) | record, path, metadata)
        return
    header, content = read_header(path), path.read_bytes()
    specs, data = [], []
    for t in header.tensors.values():
        specs.append(GGUFSpec(t.name, t.shape, t.ggml_type))
        stored = content[t.offset : t.offset + t.nbytes]
        data.append((t.name, torch.frombuffer(bytearray(stored), dtype=torch.uint8)))
    for name, tensor in record.items():
        specs.append(GGUFSpec(name, tuple(tensor.shape), _GGML_TYPES[tensor.dtype]))
        data.append((name, tensor.view(torch.uint8)))
    metadata = dict(header.metadata) | {"ideogram4.lora_basis": "folded"}
    write_gguf(path, specs, metadata, data=data, overwrite=True)
