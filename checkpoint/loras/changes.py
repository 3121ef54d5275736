"""Changes of a weight that no low-rank product is: DoRA, OFT, BOFT, large LoKr and LoHa, diffs.

Each kind is a function ``W -> W'`` as its trainer computes it, in float32. A LoRA of strength s
makes ``W + s (W' - W)``, whatever the kind: 0 is the model as it was, 1 as trained. Changes of one
weight by several files are added up, each computed of the model's own weight, so their order does
not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightChange:
    """What one file does to one weight or bias.

    kind: a key of KINDS. tensors: the file's, float32. scale: alpha / rank for products, the bound
    of OFT and BOFT (0: none). first: the first of the rows that it is for, where q, k or v of a
    fused linear is stored apart; rows: how many (all: None). magnitude: of a DoRA, [rows] or
    [1, K].
    """

    kind: str
    tensors: Tensors
    scale: float = 1.0
    first: int = 0
    rows: int | None = None
    magnitude: Tensor | None = field(default=None)

    @property
    def name(self) -> str:
        """The kind in words."""
        return "DoRA" if self.magnitude is not None else NAMES[self.kind]


def changed(weight: Tensor, changes: Iterable[tuple[WeightChange, float]]) -> Tensor:
    """``W + sum of s (W' - W)`` of (change, s): a new tensor in W's dtype, computed in float32."""
    original = weight.float()
    result = original.clone()
    for change, strength in changes:
        last = None if change.rows is None else change.first + change.rows
        rows = slice(change.first, last)
        # in place: a fused qkv of the real model is 255 MB in float32
        difference = applied(original[rows], change).sub_(original[rows])
        result[rows].add_(difference, alpha=strength)
    return result.to(weight.dtype)


def applied(weight: Tensor, change: WeightChange) -> Tensor:
    """``W'`` of the rows that a change is for: a new float32 tensor of the shape of ``weight``."""
    found = {name: tensor.to(weight) for name, tensor in change.tensors.items()}
    after = KINDS[change.kind](weight, found, change.scale)
    if change.magnitude is None:
        return after
    magnitude = change.magnitude.to(weight)
    if magnitude.ndim == 1:
        magnitude = magnitude[:, None]
    axis = 0 if magnitude.shape[0] == 1 and len(weight) != 1 else 1
    # no 0 / 0 in a row of zeros
    norm = torch.linalg.vector_norm(after, dim=axis, keepdim=True).clamp_min(1e-12)
    return after.mul_(magnitude / norm)


def _lora(weight: Tensor, found: Tensors, scale: float) -> Tensor:
    """``W + s up down``"""
    return torch.addmm(weight, found["up"], found["down"], alpha=scale)


def _loha(weight: Tensor, found: Tensors, scale: float) -> Tensor:
    """``W + s (w1_a w1_b) * (w2_a w2_b)``, elementwise."""
    first = found["hada_w1_a"] @ found["hada_w1_b"]
    return torch.addcmul(weight, first, found["hada_w2_a"] @ found["hada_w2_b"], value=scale)


def _lokr(weight: Tensor, found: Tensors, scale: float) -> Tensor:
    """``W + s w1 (x) w2``, each whole or a product of two."""
    first, second = (
        found[name] if name in found else found[f"{name}_a"] @ found[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    return torch.add(weight, torch.kron(first, second), alpha=scale)


def _diff(weight: Tensor, found: Tensors, scale: float) -> Tensor:
    return torch.add(weight, found["diff"].reshape(weight.shape), alpha=scale)


def _set(weight: Tensor, found: Tensors, _scale: float) -> Tensor:
    return found["set_weight"].reshape(weight.shape).clone()


def _rotations(blocks: Tensor, bound: float) -> Tensor:
    """``(I + Q) (I - Q)^-1``, ``Q = B - B^T`` with its whole norm bounded where bound > 0."""
    skew = blocks - blocks.mT
    norm = torch.linalg.vector_norm(skew)
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def _oft(weight: Tensor, found: Tensors, bound: float) -> Tensor:
    """kohya's and LyCORIS': each block of rows ``R^T W``, then ``rescale`` a row."""
    blocks = found["oft_blocks"]
    parts = weight.reshape(len(blocks), blocks.shape[1], -1)
    after = (_rotations(blocks, bound).mT @ parts).reshape(weight.shape)
    return _rescaled(after, found.get("rescale"))


def _boft(weight: Tensor, found: Tensors, bound: float) -> Tensor:
    """LyCORIS': butterfly stages over the rows, stage i between rows 2^i b/2 apart."""
    blocks = found["oft_blocks"]  # [stages, blocks, b, b]
    rotations, after, half = _rotations(blocks, bound), weight, blocks.shape[-1] // 2
    for stage, rotation in enumerate(rotations):
        apart = 2**stage * half
        mixed = after.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
        mixed = (rotation @ mixed.unflatten(0, (-1, 2 * half))).flatten(0, 1)
        after = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(after, found.get("rescale"))


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    return weight if rescale is None else weight * rescale.reshape(-1, 1)


def _oft_of_inputs(weight: Tensor, found: Tensors, bound: float) -> Tensor:
    """PEFT's and OneTrainer's: ``W R^T``, R in blocks over the inputs, one block shared by all or
    one each, ``R = I + 2Q + 2Q^2 + 2Q^3 + Q^4`` (their five terms of the Cayley map), with PEFT's
    COFT of a Q no longer than ``bound``."""
    upper = found["oft_R"]
    size = block_size(upper.shape[1])
    row, column = torch.triu_indices(size, size, 1, device=upper.device)
    skew = upper.new_zeros(len(upper), size, size)
    skew[:, row, column] = upper
    skew = skew - skew.mT
    if bound:
        length = torch.linalg.matrix_norm(skew, keepdim=True).clamp_min(1e-30)
        skew = skew * (bound / length).clamp_max(1.0)
    square = skew @ skew
    eye = torch.eye(size, dtype=skew.dtype, device=skew.device)
    rotation = eye + 2 * skew + 2 * square + 2 * square @ skew + square @ square
    parts = weight.unflatten(1, (-1, 1, size)).transpose(0, 1)  # [blocks, N, 1, size]
    return (parts @ rotation.mT[:, None]).transpose(0, 1).reshape(weight.shape)


def block_size(entries: int) -> int:
    """The side of a square matrix of which ``entries`` are above the diagonal; 0: none has."""
    size = round((1 + (1 + 8 * entries) ** 0.5) / 2)
    return size if entries and size * (size - 1) // 2 == entries else 0


def _boft_of_inputs(weight: Tensor, found: Tensors, _scale: float) -> Tensor:
    """PEFT's, of one factor: ``s W R^T``, R of blocks ``(I - Q) (I + Q)^-1``, Q = (B - B^T) / 2."""
    blocks = found["boft_R"][0]
    skew = (blocks - blocks.mT) / 2
    rotation = _rotations(-skew / 2, 0.0)
    parts = weight.unflatten(1, (len(blocks), -1)).transpose(0, 1)
    after = (parts @ rotation.mT).transpose(0, 1).reshape(weight.shape)
    return _rescaled(after, found.get("boft_s"))


KINDS: dict[str, Callable[[Tensor, Tensors, float], Tensor]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "oft of inputs": _oft_of_inputs,
    "boft of inputs": _boft_of_inputs,
    "diff": _diff,
    "set": _set,
}
NAMES = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "boft": "BOFT",
    "oft of inputs": "OFT",
    "boft of inputs": "BOFT",
    "diff": "diff",
    "set": "set weight",
}
