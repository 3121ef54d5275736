"""The regular Hadamard rotation that spreads outlier channels before quantization.

``H4`` is the regular (equal row sums) Hadamard matrix of order 4; larger ones are its Kronecker
powers, divided by the square root of their order. Each is symmetric and orthogonal, hence its own
inverse. The matrices are those of ConvRot, so a file marked ``convrot`` is computed alike here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import OpError

GROUPS = (256, 64, 16, 4)
"""Group sizes that can be rotated, largest first: powers of 4."""

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))

_matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def rotate(x: Tensor, group: int) -> Tensor:
    """``y[..., g, :] = x[..., g, :] @ H``: rotate each run of ``group`` values; its own inverse.

    ``x`` is floating point, ``[..., K]`` with K a multiple of ``group`` (one of ``GROUPS``). 16-bit
    inputs are rotated in fp32 and rounded once. Raises OpError for another group or K.
    """
    check_group(x.shape[-1], group)
    if not x.is_floating_point():
        raise OpError("only floating point values can be rotated", found=x.dtype)
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    grouped = x.to(work).reshape(-1, group)
    if group == 256:
        # H256 = H16 (x) H16: two products 16 wide take an eighth of the arithmetic of one 256 wide.
        h16 = hadamard(16, x.device, work)
        grouped = h16 @ (grouped.view(-1, 16) @ h16).view(-1, 16, 16)
    else:
        grouped = grouped @ hadamard(group, x.device, work)
    return grouped.reshape(x.shape).to(x.dtype)


def hadamard(group: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The normalized regular Hadamard matrix ``[group, group]``, kept per device and dtype."""
    device = torch.device(device)
    key = (group, device, dtype)
    found = _matrices.get(key)
    if found is not None:
        return found
    # An inference tensor could not be saved for a backward pass later on.
    with torch.inference_mode(False):
        h4 = torch.tensor(_H4, dtype=torch.float64, device="cpu")
        matrix = h4
        while matrix.shape[0] < group:
            matrix = torch.kron(matrix, h4)
        matrix = (matrix / group**0.5).to(device=device, dtype=dtype)
    # A tracer's stand-in must not outlive its trace.
    if type(matrix) is Tensor and not torch.compiler.is_compiling():
        _matrices[key] = matrix
    return matrix


def check_group(in_features: int, group: int) -> None:
    """Raise OpError unless ``group`` is one of ``GROUPS`` and divides ``in_features``."""
    if group not in GROUPS:
        raise OpError("unknown rotation group", found=group, needed=f"one of {GROUPS}")
    if in_features % group:
        raise OpError(
            "the rotation group does not divide in_features",
            found=f"in_features {in_features}",
            needed=f"a multiple of {group}",
        )


def largest_group(in_features: int, limit: int = 256) -> int | None:
    """The largest group up to ``limit`` that divides ``in_features``; None if none does."""
    return next((g for g in GROUPS if g <= limit and in_features % g == 0), None)
