"""Encode one tensor a few rows at a time, and measure on the way what that lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checkpoint.stored_rows import StoredRows
from ..errors import OpError
from ..ops.blocks.base import all_finite
from ..ops.chunks import CACHED, FED_BACK, for_each, row_chunks, uninitialised
from .encodings import Encoding
from .errors import NonFiniteWeightError, QuantOptionError
from .measure import ErrorMeter, stored_rows
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
    tensor: Tensor | StoredRows,
    *,
    file: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, Tensor], ErrorMeter]:
    """``(stored tensors by suffix, constants included; the error meter)``, all on the CPU.

    ``tensor`` is quantized or not, ``[N, K]`` or ``[K]``; beyond the result only a few rows of
    it exist in fp32, on ``device``. On a CPU chunks of rows are encoded in as many threads as
    PyTorch may use; neither the bytes nor the meter depend on their number. Raises
    NonFiniteWeightError, naming ``file`` and the tensor, for a value that is NaN or infinite or
    that the encoding cannot hold. ``advance`` is told the share that is done, after every few rows.
    """
    matrix = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
    shape = tuple(matrix.shape)
    stored = {
        suffix: uninitialised(size, dtype, torch.device("cpu"))
        for suffix, (dtype, size) in plan.encoding.parts(shape).items()
    }
    encoding = plan.encoding
    if plan.inputs is not None:
        encoding = encoding.led_by(plan.inputs, feedback=plan.feedback)
    fed_back = getattr(encoding, "feedback", None) is not None
    chunks = list(row_chunks(shape, device, FED_BACK if fed_back else CACHED))
    meters: list[ErrorMeter] = [ErrorMeter() for _ in chunks]

    def encode_chunk(at: int) -> None:
        rows = chunks[at]
        part = stored_rows(matrix, rows).to(device)
        for suffix, encoded in _encode_rows(plan, encoding, part, meters[at], rows, file).items():
            stored[suffix][rows] = encoded

    for_each(
        range(len(chunks)), encode_chunk, device, lambda n: advance(chunks[n - 1].stop / shape[0])
    )
    meter = ErrorMeter()
    for each in meters:
        meter.merge(each)
    final = plan.encoding.parts(plan.shape)
    stored = {suffix: part.reshape(final[suffix][1]) for suffix, part in stored.items()}
    return {**stored, **plan.encoding.constants()}, meter


def _encode_rows(
    plan: TensorPlan,
    encoding: Encoding,
    part: Tensor,
    meter: ErrorMeter,
    rows: slice,
    file: str | os.PathLike[str] | None,
) -> Mapping[str, Tensor]:
    """The parts of a few rows; ``meter`` counts what they lost."""
    found = encoding.encode_compiled(part) if plan.inputs is None else None
    if found is not None:
        parts, lost = found
        meter.count(lost)
        return parts
    true = part.to(torch.float32)
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
    return parts


def _check_finite(
    values: Tensor,
    plan: TensorPlan,
    rows: slice,
    file: str | os.PathLike[str] | None,
    problem: tuple[str, str],
) -> None:
    if all_finite(values):
        return
    finite = values.isfinite()
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
