"""The regular Hadamard rotation that spreads outlier channels before quantization.

``H4`` is the regular (equal row sums) Hadamard matrix of order 4; larger ones are its Kronecker
powers, divided by the square root of their order. Each is symmetric and orthogonal, hence its own
inverse. The matrices are those of ConvRot, so a file marked ``convrot`` is computed alike here.
Orders that are no power of 4 (2, 8, 32, 128, ...) are Sylvester's, powers of [[1, 1], [1, -1]]:
SDNQ rotates in such groups, ConvRot and this package's own files do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OpError
from .library import without_autocast

GROUPS = (256, 64, 16, 4)
"""Group sizes that the kernels rotate and this package writes, largest first. The formulas rotate
every power of 4: other tools write the largest that divides K, 4096 for K = 12288 or 53248."""

_H2 = ((1, 1), (1, -1))
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))

_matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def rotate(x: Tensor, group: int) -> Tensor:
    """``y[..., g, :] = x[..., g, :] @ H``: rotate each run of ``group`` values; its own inverse.

    ``x`` is floating point, ``[..., K]`` with K a multiple of ``group`` (a power of 2). 16-bit
    inputs are rotated in fp32 and rounded once. Raises OpError for another group or K.
    """
    check_order(x.shape[-1], group)
    if not x.is_floating_point():
        raise OpError("only floating point values can be rotated", found=x.dtype)
    with without_autocast(x.device):
        return _rotate(x, group)


def _rotate(x: Tensor, group: int) -> Tensor:
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    grouped = x.to(work).reshape(-1, group)
    first, *others = _factors(group)
    turned = grouped.reshape(-1, first) @ _matrix(first, x, work)
    width = first
    for order in others:
        turned = _matrix(order, x, work) @ turned.view(-1, order, width)
        width *= order
    return turned.reshape(x.shape).to(x.dtype)


def _factors(group: int) -> tuple[int, ...]:
    """Orders whose matrices' Kronecker product is that of ``group``.

    H256 = H16 (x) H16: two products 16 wide take an eighth of the arithmetic of one 256 wide.
    """
    if group <= 64 or not is_group(group):
        return (group,)
    sixteens, rest = [], group
    while rest >= 16:
        sixteens.append(16)
        rest //= 16
    return (*sixteens, rest) if rest > 1 else tuple(sixteens)


def _matrix(order: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    if type(x) is Tensor and not torch.compiler.is_compiling():
        return hadamard(order, x.device, dtype)
    # A tracer's stand-in cannot be multiplied by a matrix from outside the trace.
    return _kronecker_power(x.new_tensor(_base(order), dtype=dtype), order)


def hadamard(group: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The normalized Hadamard matrix ``[group, group]``, kept per device and dtype."""
    key = (group, torch.device(device), dtype)
    if key not in _matrices:
        # An inference tensor could not be saved for a backward pass later on.
        with torch.inference_mode(False):
            base = torch.tensor(_base(group), dtype=torch.float64)
            _matrices[key] = _kronecker_power(base, group).to(dtype).to(device)
    return _matrices[key]


def _base(order: int) -> tuple[tuple[int, ...], ...]:
    return _H4 if is_group(order) else _H2


def _kronecker_power(base: Tensor, order: int) -> Tensor:
    matrix = base
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, base)
    return matrix / order**0.5


def check_group(in_features: int, group: int) -> None:
    """Raise OpError unless ``group`` is a power of 4 and divides ``in_features``."""
    if not is_group(group):
        raise OpError("unknown rotation group", found=group, needed="a power of 4")
    _check_divides(in_features, group)


def check_order(in_features: int, order: int) -> None:
    """Raise OpError unless :func:`rotate` rotates groups of ``order`` and it divides the width."""
    if not is_order(order):
        raise OpError("unknown rotation group", found=order, needed="a power of 2, at least 2")
    _check_divides(in_features, order)


def _check_divides(in_features: int, group: int) -> None:
    if in_features % group:
        raise OpError(
            "the rotation group does not divide in_features",
            found=f"in_features {in_features}",
            needed=f"a multiple of {group}",
        )


def is_group(group: int) -> bool:
    """Whether a regular Hadamard matrix of this order is made here: 4, 16, 64, 256, 1024, ..."""
    return group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1


def is_order(order: int) -> bool:
    """Whether :func:`rotate` takes it: every power of 4, and other powers of 2 up to 2048, which
    are one product with a whole matrix."""
    return is_group(order) or (2 <= order <= 2048 and order & (order - 1) == 0)


def largest_group(in_features: int, limit: int = 256) -> int | None:
    """The largest group up to ``limit`` that divides ``in_features``; None if none does."""
    return next((g for g in GROUPS if g <= limit and in_features % g == 0), None)
