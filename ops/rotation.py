"""The regular Hadamard rotation that spreads outlier channels before quantization.

``H4`` is the regular (equal row sums) Hadamard matrix of order 4; larger ones are its Kronecker
powers, divided by the square root of their order. Each is symmetric and orthogonal, hence its own
inverse. The matrices are those of ConvRot, so a file marked ``convrot`` is computed alike here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OpError
from .library import without_autocast

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
    with without_autocast(x.device):
        return _rotate(x, group)


def _rotate(x: Tensor, group: int) -> Tensor:
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    grouped = x.to(work).reshape(-1, group)
    # H256 = H16 (x) H16: two products 16 wide take an eighth of the arithmetic of one 256 wide.
    order = 16 if group == 256 else group
    if type(x) is Tensor and not torch.compiler.is_compiling():
        h = hadamard(order, x.device, work)
    else:  # A tracer's stand-in cannot be multiplied by a matrix from outside the trace.
        h = _kronecker_power(x.new_tensor(_H4, dtype=work), order)
    turned = grouped.reshape(-1, order) @ h
    if group == 256:
        turned = h @ turned.view(-1, 16, 16)
    return turned.reshape(x.shape).to(x.dtype)


def hadamard(group: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The normalized regular Hadamard matrix ``[group, group]``, kept per device and dtype."""
    key = (group, torch.device(device), dtype)
    if key not in _matrices:
        # An inference tensor could not be saved for a backward pass later on.
        with torch.inference_mode(False):
            h4 = torch.tensor(_H4, dtype=torch.float64)
            _matrices[key] = _kronecker_power(h4, group).to(dtype).to(device)
    return _matrices[key]


def _kronecker_power(h4: Tensor, order: int) -> Tensor:
    matrix = h4
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, h4)
    return matrix / order**0.5


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
