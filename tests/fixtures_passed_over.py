"""Files with something beside their weights, made by hand, their true weights by dense formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.quant.inspect import inspect_file
from ideogram4_quant.quant.quantize import quantize_checkpoint
from ideogram4_quant.quant.verify import verify_file
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage

PREFIX = "model.diffusion_model."
MODULE = "layers.0.feed_forward.w1"  # [128, 64]
STEM = ("_proj.", "t_embedding", "final_layer")
H4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2

# By suffix: what other tools store beside a weight [128, 64]
SIBLINGS = {
    "scale": torch.rand(128, 1),
    "scales": torch.rand(128, 1),
    "qscale": torch.rand(128),
    "weight.scale": torch.rand(128),
    "weight_zero_point": torch.ones(128, 1, dtype=torch.int8),
    "zero_point": torch.ones(128, 1),
    "smoothquant_factor": torch.rand(64),
    "smooth_factor": torch.rand(64),
    "proj_up": torch.rand(128, 4),
    "proj_down": torch.rand(4, 64),
    "svd_up": torch.rand(128, 4),
    "svd_down": torch.rand(4, 64),
    "quip_s_u": torch.ones(128),
    "quip_s_v": torch.ones(64),
    "orig_shape": torch.tensor([120, 64]),
    "hadamard": torch.eye(4),
    "some.thing.new": torch.ones(1),
    "lora_A.weight": torch.rand(4, 64),
}


def hadamard(order: int) -> torch.Tensor:
    """The regular Hadamard matrix by its definition: Kronecker powers of H4."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.kron(h, H4)
    return h


def rotated(weight: torch.Tensor, group: int) -> tuple[storage.State, torch.Tensor]:
    """(int8 codes and scales of ``W R``, the weight that they stand for), all dense."""
    blocks = weight.reshape(len(weight), -1, group)
    turned = (blocks @ hadamard(group)).reshape(weight.shape)
    q, scale = storage.pack_int8(turned)
    back = (q.float() * scale).reshape(blocks.shape) @ hadamard(group).T
    return {"weight": q, "weight_scale": scale}, back.reshape(weight.shape)


def conf(group: int) -> dict:
    return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}


def int8_file(path: Path, prefix: str = "", beside=None, metadata=None, **described) -> Path:
    """All block linears int8; ``beside``: more tensors of one of them, by suffix."""
    stored, _ = storage.packed(
        files.model(), lambda w: storage.pack_comfy_int8(w, None), prefix, skip=STEM
    )
    for key in [key for key in stored if key.endswith(".comfy_quant")]:
        stored[key] = storage.as_json({"format": "int8_tensorwise", **described})
    stored |= {f"{prefix}{MODULE}.{suffix}": value for suffix, value in (beside or {}).items()}
    return files.save(path, stored, metadata)


def refused(path: Path, *words: str) -> str:
    """The words in which opening refuses, and every command that reads the file in the same."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    said = str(caught.value)
    for word in words:
        assert word in said, said
    assert "incomplete or damaged" not in said
    with pytest.raises(CheckpointError) as again:
        inspect_file(path)
    assert str(again.value) == said
    with pytest.raises(CheckpointError) as again:
        verify_file(path, path)
    assert str(again.value) == said
    with pytest.raises(CheckpointError) as again:
        quantize_checkpoint(path, "Q8_0", path.with_name("out.gguf"))
    assert str(again.value) == said
    return said
