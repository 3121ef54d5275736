"""Encode one tensor a few rows at a time, and measure on the way what that lost."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import OpError
from ..ops.chunks import CACHED, FED_BACK, row_chunks
from .errors import NonFiniteWeightError, QuantOptionError
from .measure import ErrorMeter, dense_rows
from .plan import TensorPlan

_DAMAGED = (
    "holds values that are not finite",
    "The source is damaged, or its training diverged: nothing can be made from it.",
)
_PROTECT = "Protect this linear, or give it another type."
_TOO_LARGE = ("has values too large for {type}", _PROTECT)


def encoding_device(device: str | torch.device) -> torch.device:
    """The device, checked. Raises QuantOptionError for one that is not there."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuantOptionError(
            f"cannot encode on this device: {reason}", found=device, hint="Leave --device out."
        ) from error
    if found.type == "meta":
        raise QuantOptionError("cannot encode on this device", found=device)
    return found


def encode_tensor(
    plan: TensorPlan,
    tensor: Tensor,
    *,
    file: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, Tensor], ErrorMeter]:
    """``(stored tensors by suffix, constants included; the error meter)``, all on the CPU.

    ``tensor`` is quantized or not, ``[N, K]`` or ``[K]``; beyond the result only a few rows of
    it exist in fp32, on ``device``. Raises NonFiniteWeightError, naming ``file`` and the tensor,
    for a value that is NaN or infinite or that the encoding cannot hold. ``advance`` is told the
    share that is done, after every few rows.
    """
    matrix = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
    shape = tuple(matrix.shape)
    stored = {
        suffix: torch.empty(size, dtype=dtype)
        for suffix, (dtype, size) in plan.encoding.parts(shape).items()
    }
    meter = ErrorMeter()
    encoding = plan.encoding
    if plan.inputs is not None:
        encoding = encoding.led_by(plan.inputs, feedback=plan.feedback)
    fed_back = getattr(encoding, "feedback", None) is not None
    for rows in row_chunks(shape, device, FED_BACK if fed_back else CACHED):
        true = dense_rows(matrix, rows).to(device)
        _check_finite(true, plan, rows, file, _DAMAGED)
        try:
            parts = encoding.encode(true)
        except OpError as error:  # block scales are fp16
            raise NonFiniteWeightError(
                f"cannot be stored as {plan.encoding.label}: {error.message}",
                file=file,
                tensor=_shown(plan),
                found=error.found,
                needed=error.needed,
                hint=_PROTECT,
            ) from error
        back = plan.encoding.decode(parts)
        _check_finite(back, plan, rows, file, _TOO_LARGE)
        meter.add(true, back, plan.inputs)
        for suffix, part in parts.items():
            stored[suffix][rows] = part
        advance(rows.stop / shape[0])
    final = plan.encoding.parts(plan.shape)
    stored = {suffix: part.reshape(final[suffix][1]) for suffix, part in stored.items()}
    return {**stored, **plan.encoding.constants()}, meter


def _check_finite(
    values: Tensor,
    plan: TensorPlan,
    rows: slice,
    file: str | os.PathLike[str] | None,
    problem: tuple[str, str],
) -> None:
    finite = values.isfinite()
    if bool(finite.all()):
        return
    row, column = (~finite).nonzero()[0].tolist()
    value = values[row, column].item()
    place = [row + rows.start, column] if len(plan.shape) == 2 else [column]
    raise NonFiniteWeightError(
        problem[0].format(type=plan.encoding.label),
        file=file,
        tensor=_shown(plan),
        found=f"{value} at {place}",
        needed="finite values",
        hint=problem[1],
    )


def _shown(plan: TensorPlan) -> str:
    return plan.name if plan.copy == "conditional" else f"{plan.copy}.{plan.name}"
