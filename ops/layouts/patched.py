"""Blocks of a weight that was decoded, changed a little and is encoded again.

A LoRA of usual strength moves a weight by a few percent, less than half a step of a 4-bit grid.
Rounded to nearest, all codes stay as they were and the LoRA is gone: at Q4_K 4 % is left of one
that changes the weight by 2 %. Such a change has few directions. Codes are then chosen on the
stored grid so that their errors cancel along these directions (see ``feedback``): 98 % is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import blocks
from ..blocks.coded import CodedFormat
from ..chunks import FED_BACK, row_chunks
from ..decoding import dequantize
from ..feedback import MOST_SHARED, Feedback
from .kept import KEPT

_MUCH = 0.5
"""Share of a change that encoding anew has to keep for its grid to be good enough."""

_DIRECTIONS = 64  # at most, and one for so many columns:
_COLUMNS_EACH = 16
_NEGLIGIBLE = 1e-4  # of the energy of the largest direction


def change_blocks(weight: Tensor, stored: Tensor, qtype: str) -> Tensor:
    """Blocks uint8 [N, row bytes] of ``weight`` float [N, K], which ``stored`` was before.

    Rows that did not change keep their bytes. The others are encoded anew where that keeps the
    change, else rounded so that it is kept along its directions: on the grid they have, or on a new
    one where the change is large.
    """
    form = blocks.FORMATS[qtype]
    n, k = weight.shape
    out = torch.empty_like(stored)
    sketch = weight.new_zeros((k, max(1, min(_DIRECTIONS, k // _COLUMNS_EACH))), dtype=torch.float)
    probe = _probe(k, sketch.shape[1]).to(sketch)
    kept = energy = 0.0
    for rows in row_chunks((n, k), weight.device):
        true, before = _pair(weight[rows], stored[rows], qtype)
        change = true - before
        out[rows] = blocks.quantize(true, qtype)
        same = ~change.any(1)
        out[rows][same] = stored[rows][same]
        found = dequantize(out[rows], qtype, tuple(true.shape), torch.float32) - before
        kept += (found * change).sum(dtype=torch.float).item()
        energy += change.square().sum(dtype=torch.float).item()
        sketch += change.t() @ (change @ probe)
    if not isinstance(form, CodedFormat) or kept >= KEPT * energy:
        return out
    return _along_directions(
        weight, stored, out if kept >= _MUCH * energy else stored, qtype, sketch
    )


def _along_directions(
    weight: Tensor, stored: Tensor, grid: Tensor, qtype: str, sketch: Tensor
) -> Tensor:
    """Blocks with the scales of ``grid``; ``sketch`` [K, r] spans the directions of the change."""
    form, shape = blocks.FORMATS[qtype], tuple(weight.shape)
    # on the CPU, as some devices have no such decomposition
    sketch = sketch.cpu() / sketch.abs().max().clamp_min(1e-30).item()
    basis = torch.linalg.qr(sketch)[0].to(weight.device)
    size = torch.zeros_like(basis[0])
    for rows in row_chunks(shape, weight.device):
        true, before = _pair(weight[rows], stored[rows], qtype)
        size += ((true - before) @ basis).square().sum(0)
    basis = basis[:, size > _NEGLIGIBLE * size.max()]
    share = (MOST_SHARED * shape[1] / max(1, basis.shape[1])) ** 0.5
    follow = Feedback(torch.ones(shape[1], device="cpu"), basis * share)
    out = torch.empty_like(stored)
    many = max(1, FED_BACK // shape[1])
    for start in range(0, shape[0], many):
        rows = slice(start, start + many)
        true, before = _pair(weight[rows], stored[rows], qtype)
        changed = (true != before).any(1)
        out[rows] = stored[rows]
        if changed.any():
            out[rows][changed] = form.follow(grid[rows][changed], true[changed], follow)
    return out


def _pair(weight: Tensor, stored: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    """The rows as they shall be and as they were, float32, free of the dtype's own rounding."""
    before = dequantize(stored, qtype, tuple(weight.shape), torch.float32)
    return before + (weight.float() - before.to(weight.dtype).float()), before


def _probe(k: int, count: int) -> Tensor:
    """[K, count] of +-1, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (k, count), generator=generator).mul_(2).sub_(1)
