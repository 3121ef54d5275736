"""What a quantization did: one row a tensor, totals, the worst layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .measure import ErrorMeter
from .tables import human_bytes, human_db, off_by, text_table


@dataclass(frozen=True)
class TensorResult:
    """One stored tensor: ``type`` as in the file, ``nbytes`` with its scales, the loss it took.

    ``sqnr_db`` is the weight's own, against the source's values; inf where nothing was lost.
    ``output_db`` is that of the linear's outputs, as a calibration foretells it, without what int8
    activations cost; None without a calibration.
    ``linear`` marks the weights of linear layers, ``protected`` those kept on request.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    sqnr_db: float
    max_abs_error: float
    linear: bool
    protected: bool = False
    output_db: float | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; a figure that JSON cannot hold (inf, NaN) becomes None."""
        return {
            **self.__dict__,
            "shape": list(self.shape),
            "sqnr_db": finite_or_none(self.sqnr_db),
            "max_abs_error": finite_or_none(self.max_abs_error),
            "output_db": finite_or_none(self.output_db),
        }


@dataclass(frozen=True)
class QuantReport:
    """The result of :func:`quantize_checkpoint`.

    ``meter`` holds the sums over all linears: its ``sqnr_db`` is that of the model's weights as
    one vector. ``metadata`` is what the file says of itself, ``notes`` what was logged as warnings.
    """

    path: str
    level: str
    container: str
    copies: tuple[str, ...]
    size: int
    source_size: int
    tensors: tuple[TensorResult, ...]
    meter: ErrorMeter
    metadata: dict[str, object]
    notes: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[TensorResult, ...]:
        return tuple(t for t in self.tensors if t.linear)

    def worst(self, count: int = 10) -> list[TensorResult]:
        """The linears that lost most, worst first; those stored without loss are left out."""
        return worst_first(self.linears)[:count]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "path": self.path,
            "level": self.level,
            "container": self.container,
            "copies": list(self.copies),
            "size": self.size,
            "source_size": self.source_size,
            "sqnr_db": finite_or_none(self.meter.sqnr_db),
            "max_abs_error": finite_or_none(self.meter.max_abs_error),
            "output_db": finite_or_none(self.meter.output_db),
            "tensors": [t.to_dict() for t in self.tensors],
            "metadata": self.metadata,
            "notes": list(self.notes),
        }

    def table(self, count: int = 10) -> str:
        """The totals by type, then the ``count`` worst layers."""
        totals = (
            f"{self.path}: {self.level}, {human_bytes(self.size)} "
            f"({self.size / max(self.source_size, 1):.2f} of the source), "
            f"weights {off_by(self.meter.sqnr_db)}{foretold(self.meter)}"
        )
        parts = [totals, totals_table(self.tensors)]
        worst = self.worst(count)
        if worst:
            parts.append(f"worst {len(worst)} of {len(self.linears)} linears:")
            parts.append(worst_table(worst))
        return "\n\n".join(parts)


def finite_or_none(value: float | None) -> float | None:
    """The value, or None where there is none or JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def foretold(meter: ErrorMeter) -> str:
    """``, outputs off by 1 % (40.12 dB)`` where a calibration foretells it."""
    return "" if meter.output_db is None else f", outputs {off_by(meter.output_db)}"


def worst_first(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    """Lossy tensors by falling loss; NaN counts as the worst, equal ones stay in file order.

    The loss of a linear's outputs where a calibration foretells it, else of the tensor itself.
    """
    lossy = [t for t in tensors if t.sqnr_db != math.inf]

    def kept(tensor: TensorResult) -> float:
        decibels = tensor.sqnr_db if tensor.output_db is None else tensor.output_db
        return -math.inf if math.isnan(decibels) else decibels

    return sorted(lossy, key=kept)


def worst_table(tensors: Sequence[TensorResult]) -> str:
    """A row a tensor: name, type, shape, dB, largest error; dB of outputs where foretold."""
    header = ["layer", "type", "shape", "SQNR dB", "max error"]
    rows = [
        [
            t.name,
            t.type,
            " x ".join(map(str, t.shape)),
            human_db(t.sqnr_db),
            f"{t.max_abs_error:.3g}",
        ]
        for t in tensors
    ]
    if any(t.output_db is not None for t in tensors):
        header.append("output dB")
        for row, tensor in zip(rows, tensors, strict=True):
            row.append("" if tensor.output_db is None else human_db(tensor.output_db))
    return text_table(header, rows, left=2)


def totals_table(tensors: Sequence[TensorResult]) -> str:
    """A row a type: linears, other tensors, weights, bytes."""
    rows = []
    for kind in dict.fromkeys(t.type for t in tensors):
        of_kind = [t for t in tensors if t.type == kind]
        linears = sum(t.linear for t in of_kind)
        rows.append(
            (
                kind,
                str(linears),
                str(len(of_kind) - linears),
                f"{sum(math.prod(t.shape) for t in of_kind):,}",
                human_bytes(sum(t.nbytes for t in of_kind)),
            )
        )
    return text_table(("type", "linears", "others", "values", "size"), rows)
