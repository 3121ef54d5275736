"""Arithmetic of the searches: dimension 0 runs over what is summed, the others over problems.

A search makes some hundred calls for a chunk of blocks, and on rows a call costs as much as its
work. Hence sums and choices that are bound to their buffers once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..wide import wide


def every_row(row: Tensor, like: Tensor) -> Tensor:
    """``row`` [..., a row's blocks] again and again, in the shape of ``like`` [..., blocks]."""
    return row.repeat(*[1] * (row.ndim - 1), like.shape[-1] // max(1, row.shape[-1]))


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over dimension 0 from first to last: torch.sum's order depends on shape and threads."""
    total = torch.empty_like(terms[0], memory_format=torch.contiguous_format)
    bind_sum(terms, total)()
    return total


def bind_sum(terms: Tensor, total: Tensor) -> Callable[[], object]:
    """A call that sets ``total`` to the ``ordered_sum`` of what ``terms`` then holds.

    numpy adds whole rows to an accumulator, one after another, where the rest of the array is one
    contiguous run of several values (a single one it would sum pairwise).
    """
    plain = terms.is_contiguous() and total.is_contiguous() and terms.numel() >= 2 * len(terms)
    if terms.device.type == "cpu" and plain:
        rows, out = terms.view(len(terms), -1).numpy(), total.view(-1).numpy()
        return lambda: np.add.reduce(rows, 0, None, out)

    def add_rows() -> None:
        total.copy_(terms[0])
        for row in terms[1:]:
            total.add_(row)

    return add_rows


def bind_choice(flags: Tensor, trial: Tensor, kept: Tensor) -> Callable[[], None]:
    """A call that sets ``kept`` to ``where(flags, trial, kept)`` and uses ``trial`` up.

    flags: float32, one or zero; trial, kept: float32, of its shape, or stacks of such. By bits:
    torch.where takes a branch for each value, which a processor cannot foretell here.
    """
    mask = torch.empty_like(flags, dtype=torch.int32)
    trial, kept = trial.view(torch.int32), kept.view(torch.int32)

    def choose() -> None:
        mask.copy_(flags).neg_()  # all bits or none
        kept.bitwise_xor_(trial.bitwise_xor_(kept).bitwise_and_(mask))

    return choose


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded float32 root, by way of float64: torch.sqrt may be off by an ulp."""
    return wide(values).sqrt_().to(torch.float32).to(values.device)
