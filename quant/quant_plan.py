"""What a quantization will do, told before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .choose import choice_notes
from .measure import ErrorMeter
from .plan import TensorPlan, planned_bytes, rotation_notes, rounding_notes
from .recipes import QuantOptions, Recipe
from .report import TensorResult, totals_table
from .source import Source
from .tables import human_bytes


@dataclass(frozen=True)
class QuantPlan:
    """What a quantization will do, known without reading a weight."""

    recipe: Recipe
    container: str
    options: QuantOptions
    source: Source
    out: Path
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data to write; the header comes on top."""
        return planned_bytes(self.tensors)

    @property
    def notes(self) -> list[str]:
        choices = {(p.copy, p.module): p.choice for p in self.tensors if p.choice is not None}
        chosen = choice_notes(self.container, choices)
        rounded = rounding_notes(self.options)
        unseen = _unseen_notes(self.options, self.tensors)
        return rotation_notes(self.recipe, self.tensors) + rounded + unseen + chosen

    def stored_name(self, plan: TensorPlan, suffix: str) -> str:
        """Name in the file of one stored tensor."""
        name = f"{plan.module}.{suffix}"
        return f"{plan.copy}.{name}" if self.container == "transformer-lab" else name

    def table(self) -> str:
        """What will be written, by type."""
        planned = [tensor_result(self, plan, ErrorMeter()) for plan in self.tensors]
        copies, paths = " + ".join(self.source.copies), ", ".join(map(str, self.source.paths))
        head = (
            f"{self.out}: {self.recipe.level} ({self.container}), {copies}, "
            f"{human_bytes(self.nbytes)} from {paths} ({self.source.level})"
        )
        return "\n\n".join([head, totals_table(planned), *self.notes])


def _unseen_notes(options: QuantOptions, tensors: Sequence[TensorPlan]) -> list[str]:
    """What is quantized without the statistics that all others have."""
    calibration = options.calibration
    quantized = [plan for plan in tensors if plan.quantized]
    if calibration is None:
        return []
    unseen = [plan for plan in quantized if calibration.layer(plan.copy, plan.module) is None]
    if not unseen:
        return []
    return [
        f"{calibration.path or 'the calibration'} knows nothing of {len(unseen)} of "
        f"{len(quantized)} linears ({unseen[0].copy}.{unseen[0].module} is one): their inputs "
        "count alike, and codes are rounded to nearest"
    ]


def tensor_result(plan: QuantPlan, tensor: TensorPlan, meter: ErrorMeter) -> TensorResult:
    """The row of one tensor; the meter of nothing for a plan alone."""
    several = len(plan.source.copies) > 1
    return TensorResult(
        name=f"{tensor.copy}.{tensor.name}" if several else tensor.name,
        shape=tensor.shape,
        type=tensor.encoding.label,
        nbytes=tensor.nbytes,
        sqnr_db=meter.sqnr_db,
        output_db=meter.output_db,
        max_abs_error=meter.max_abs_error,
        linear=tensor.linear,
        protected=tensor.protected,
    )
