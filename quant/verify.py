"""Compare the weights of two files of one model, however they are stored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.canonical import is_linear
from ..errors import PairMismatchError
from ..ops.chunks import row_chunks
from ..ops.layouts import QuantizedTensor
from .calibration import Calibration
from .input_moments import InputMoments
from .measure import ErrorMeter, channel_absmax, dense_rows
from .report import TensorResult, finite_or_none, foretold, worst_first, worst_table
from .source import BaseLike
from .tables import off_by


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_file` found.

    ``tensors``: one row for each tensor that both files hold; the row's ``type`` is the file's own
    file of it. ``meter``: sums over the linears. ``missing`` and ``extra``: names that only the
    reference, or only the file, holds. ``folded``: smoothing lies in the file's weights, which are
    compared in original coordinates all the same.
    """

    path: str
    against: str
    copies: tuple[str, ...]
    tensors: tuple[TensorResult, ...]
    meter: ErrorMeter
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    folded: bool = False

    def worst(self, count: int = 10) -> list[TensorResult]:
        """The tensors that differ most, worst first; equal ones are left out."""
        return worst_first(self.tensors)[:count]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; a figure that JSON cannot hold (inf, NaN) becomes None."""
        return {
            "path": self.path,
            "against": self.against,
            "copies": list(self.copies),
            "sqnr_db": finite_or_none(self.meter.sqnr_db),
            "max_abs_error": finite_or_none(self.meter.max_abs_error),
            "output_db": finite_or_none(self.meter.output_db),
            "tensors": [t.to_dict() for t in self.tensors],
            "folded": self.folded,
            "missing": list(self.missing),
            "extra": list(self.extra),
        }

    def table(self, count: int = 10) -> str:
        """The overall figure, the ``count`` worst tensors, and what has no counterpart."""
        linears = sum(t.linear for t in self.tensors)
        lines = [
            f"{self.path} against {self.against} ({' + '.join(self.copies)}): "
            f"weights of {linears} linears {off_by(self.meter.sqnr_db)}{foretold(self.meter)}"
        ]
        if self.folded:
            lines.append(
                "a folded file: its weights are rounded in the basis of the smoothed inputs, so a "
                "low figure here is no loss where the inputs are small"
            )
        worst = self.worst(count)
        if worst:
            differing = len(worst_first(self.tensors))
            lines.append(f"worst {len(worst)} of {differing} that differ:")
            lines.append(worst_table(worst))
        else:
            lines.append(f"all {len(self.tensors)} tensors are equal")
        for what, names in (("missing", self.missing), ("not in the reference", self.extra)):
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                lines.append(f"{len(names)} tensors {what}: {shown}")
        return "\n\n".join(lines)


def verify_file(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    copy: str | None = None,
    base: BaseLike | Sequence[BaseLike] | None = None,
    against_base: BaseLike | Sequence[BaseLike] | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """SQNR in dB of every tensor of ``path`` against ``against``, dequantized, in fp32.

    Compares ``copy``, or every copy that both files hold; with a calibration of the reference the
    outputs that it foretells too. Streams: tensors wait only until the other file has brought
    theirs. ``progress(done, total)`` counts values. Raises PairMismatchError if the files have no
    copy in common or tensors of other shapes, CalibrationError for a calibration of another model,
    and what ``open_checkpoint`` raises.
    """
    file = open_checkpoint(path, base, copy=copy)
    reference = open_checkpoint(against, against_base, copy=copy)
    copies = _common_copies(file, reference)
    several = len(copies) > 1
    total = sum(math.prod(s) for c in copies for s in reference.shapes(c).values())
    done = 0
    meter = ErrorMeter()
    rows, missing, extra = [], [], []
    for chosen in copies:
        prefix = f"{chosen}." if several else ""
        ours, theirs = file.shapes(chosen), reference.shapes(chosen)
        if calibration is not None:
            calibration.check_shapes(chosen, theirs)
        missing += [prefix + name for name in theirs if name not in ours]
        extra += [prefix + name for name in ours if name not in theirs]
        for name, stored, true in _pairs(file, reference, chosen):
            if stored.shape != true.shape:
                raise PairMismatchError(
                    f"is of another shape than in {against}",
                    file=path,
                    tensor=name,
                    found=list(stored.shape),
                    needed=list(true.shape),
                )
            inputs = None
            if calibration is not None and is_linear(name):
                inputs = _inputs(calibration, chosen, name, true, str(against))
            row, part = _compare(prefix + name, name, stored, true, inputs)
            rows.append(row)
            if row.linear:
                meter.merge(part)
            done += math.prod(row.shape)
            if progress is not None:
                progress(done, total)
    folded = any(file.folding(chosen) is not None for chosen in copies)
    return Verification(
        str(path), str(against), copies, tuple(rows), meter, tuple(missing), tuple(extra), folded
    )


def _common_copies(file: Checkpoint, reference: Checkpoint) -> tuple[str, ...]:
    copies = tuple(c for c in file.copies if c in reference.copies)
    if not copies:
        raise PairMismatchError(
            f"has no copy in common with {reference.paths[0]}",
            file=file.paths[0],
            found=f"{', '.join(file.copies)} ({file.copy_reason})",
            needed=f"{', '.join(reference.copies)} ({reference.copy_reason})",
        )
    return copies


def _pairs(
    file: Checkpoint, reference: Checkpoint, copy: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, the file's tensor, the reference's) for every name that both hold."""
    common = file.shapes(copy).keys() & reference.shapes(copy).keys()
    streams = [c.stream(copy, dtype=torch.float32) for c in (file, reference)]
    waiting: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    live = [True, True]
    while any(live):
        for side in (0, 1):
            item = next(streams[side], None)
            live[side] = item is not None
            if item is None or item[0] not in common:
                continue
            name, tensor = item
            waiting[side][name] = tensor
            if name in waiting[1 - side]:
                yield name, waiting[0].pop(name), waiting[1].pop(name)


def _inputs(
    calibration: Calibration, copy: str, name: str, true: Tensor, against: str
) -> InputMoments | None:
    """The moments of a linear's inputs, if the calibration watched this very linear."""
    module = name.removesuffix(".weight")
    stats = calibration.layer(copy, module)
    if stats is None:
        return None
    calibration.check_weight(copy, module, channel_absmax(true), against)
    return stats.moments


def _compare(
    shown: str, name: str, stored: Tensor, true: Tensor, inputs: InputMoments | None
) -> tuple[TensorResult, ErrorMeter]:
    meter = ErrorMeter()
    shape = tuple(true.shape)
    for rows in row_chunks(shape):
        meter.add(dense_rows(true, rows), dense_rows(stored, rows), inputs)
    result = TensorResult(
        name=shown,
        shape=shape,
        type=_type_of(stored),
        nbytes=stored.nbytes,
        sqnr_db=meter.sqnr_db,
        output_db=meter.output_db,
        max_abs_error=meter.max_abs_error,
        linear=is_linear(name),
    )
    return result, meter


def _type_of(tensor: Tensor) -> str:
    if isinstance(tensor, QuantizedTensor):
        return tensor._params.label
    return str(tensor.dtype).removeprefix("torch.")
