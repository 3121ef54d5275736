"""What every launcher does before its kernel: check, flatten to rows, pick the device."""

from __future__ import annotations

import contextlib
import functools
import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...errors import OpError
from ..rotation import GROUPS, check_group
from .configs import MAX_ROW, row_blocks, table_architecture

log = logging.getLogger(__name__)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of ``x`` current: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose configurations ``device`` uses; a CPU under the interpreter: 86."""
    if device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return table_architecture(major * 10 + minor)


def each_row(rows: int, k: int, kernels: tuple, *arguments: object, **steps: object) -> None:
    """One program a row of K values: the first kernel where registers hold it, else the second."""
    blocks, num_warps = row_blocks(k)
    kernel = kernels[k > MAX_ROW]
    kernel[(rows,)](*arguments, **blocks, num_warps=num_warps, **steps)


def int8_rows(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for ``q int8 [M, K]`` and ``scale fp32 [M]``."""
    q = torch.empty((m, k), dtype=torch.int8, device=device)
    return q, torch.empty(m, dtype=torch.float32, device=device)


def rows_of(x: Tensor, name: str) -> Tensor:
    """``x [..., K]`` as ``[M, K]`` with adjacent columns, a view where one exists.

    Raises OpError unless x is floating point and has at least one column.
    """
    if x.dtype not in FLOATS:
        raise OpError(f"{name} has a dtype the kernels do not take", found=x.dtype, needed=FLOATS)
    k = x.shape[-1] if x.dim() else 0
    if k == 0:
        raise OpError(f"{name} has rows without values", found=f"shape {tuple(x.shape)}")
    rows = x.reshape(-1, k)
    return rows if rows.stride(1) == 1 or k == 1 else rows.contiguous()


def vector(values: Tensor | None, name: str, k: int, like: Tensor) -> Tensor | None:
    """``values [K]`` contiguous, or None; OpError for another length or device."""
    if values is None:
        return None
    if values.numel() != k:
        raise OpError(
            f"{name} does not fit the rows", found=f"{tuple(values.shape)}", needed=f"[{k}]"
        )
    check_same_device(values, name, like, "x")
    return values.reshape(k).contiguous()


def modulation(values: Tensor, name: str, x: Tensor) -> tuple[Tensor, int, int]:
    """``values``, broadcastable to ``x [..., K]``, as rows: ``(rows, stride, x rows to one row)``.

    The usual shapes, ``[K]`` and ``[batch, 1, K]`` against ``[batch, tokens, K]``, are not copied.
    """
    check_same_device(values, name, x, "x")
    try:
        torch.broadcast_shapes(values.shape, x.shape)
        full = values.expand(x.shape)
    except RuntimeError:
        raise OpError(
            f"{name} does not broadcast",
            found=f"shape {tuple(values.shape)}",
            needed=f"to {tuple(x.shape)}",
        ) from None
    k = x.shape[-1]
    lead = list(x.shape[:-1])
    repeats = 1
    # Trailing dimensions that the values do not vary along share one row.
    while lead and (lead[-1] == 1 or full.stride(len(lead) - 1) == 0):
        repeats *= lead.pop()
        full = full.select(len(lead), 0)
    rows = full.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0), max(repeats, 1)


def check_same_shape(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    """OpError unless two tensors agree in shape and device."""
    if a.shape != b.shape:
        raise OpError(
            f"{a_name} and {b_name} differ in shape", found=tuple(b.shape), needed=tuple(a.shape)
        )
    check_same_device(b, b_name, a, a_name)


def check_same_device(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    """OpError unless two tensors lie on one device."""
    if a.device != b.device:
        raise OpError(
            f"{a_name} and {b_name} lie on different devices", found=a.device, needed=b.device
        )


def rotates(op: str, k: int, rotation: int | None) -> bool:
    """Whether the kernels rotate in such groups; if not, ``op`` runs its torch formula, said once.

    OpError unless ``rotation`` is None or a group that divides ``k``.
    """
    if rotation is None:
        return True
    check_group(k, rotation)
    if rotation not in GROUPS:
        _log_group(op, rotation)
    return rotation in GROUPS


@functools.cache
def log_fallback(op: str, k: int) -> None:
    """Say once that ``op`` runs the torch formula for rows of ``k`` values, which no tile fits."""
    log.warning("%s: no tile fits rows of %d values; they run the slower torch formula", op, k)


@functools.cache
def _log_group(op: str, rotation: int) -> None:
    log.warning(
        "%s: the kernels rotate groups of up to %d; those of %d run the slower torch formula",
        op,
        max(GROUPS),
        rotation,
    )
