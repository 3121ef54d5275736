"""What each storage of a linear costs its outputs: relative error energy, by a few of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.wide import wide
from .choose import Choice
from .encodings import Encoding, NativeInt8, Shape, follow
from .input_moments import InputMoments
from .int4_encoding import ConvrotInt4
from .layer_stats import LayerStats
from .measure import dense_rows
from .packed_encoding import PackedInt8
from .sensitivity import Loss
from .storage import INPUT_LIMITS, INT4, storage_encoding
from .treatments import Treatment

ROWS = 128
"""Output rows that errors are measured on, evenly spaced: each is rounded by itself."""

# Relative error energy of inputs rounded to int8 where no calibration measured it: steps of
# absmax / 127, the largest of thousands of rotated values being 4.5 times their rms.
_INT8_INPUTS = (4.5 / 127) ** 2 / 12
# Part of the error of INT8 that inputs make at least: both parts are estimates.
_LEAST_OF_INPUTS = 0.1


def candidate_errors(
    weight: Tensor,
    names: Sequence[str],
    container: str,
    stats: LayerStats | None,
    int8: Choice | None,
    *,
    feedback: bool = True,
    tried: int = ROWS,
) -> dict[str, Loss]:
    """Storage -> relative error energy of a linear's outputs, for those that fit its rows.

    ``weight`` [N, K], quantized or not; ``stats``: its calibration, without which all inputs
    count alike; ``int8``: what that chose for INT8. Codes of ``tried`` rows are rounded as the
    file's will be, with ``feedback`` or without. What inputs rounded to 8 or 4 bits cost stands
    beside it where a storage is multiplied so: as calibrated for 8, and by the step's square for 4.
    """
    shape: Shape = tuple(weight.shape)
    rows = _some_rows(weight, tried)
    inputs = None if stats is None else stats.moments
    energy = _Energy(inputs)
    encodings = {n: storage_encoding(n, container, shape, int8) for n in names}
    encodings = {n: e for n, e in encodings.items() if e is not None}
    led = _led(encodings, inputs, feedback)
    found = {name: Loss(energy.lost(rows, encoding)) for name, encoding in led.items()}
    cost: dict[Treatment, float] = {}
    for name in found.keys() & INPUT_LIMITS.keys():
        grid = NativeInt8(encodings[name].rotation, getattr(encodings[name], "smooth", None))
        alpha = None if grid.smooth is None else int8.treatment.alpha
        treatment = Treatment(alpha, grid.rotation is not None)
        if treatment not in cost:
            cost[treatment] = _inputs_cost(rows, grid, stats, treatment.name, energy)
        steps = (127 / INPUT_LIMITS[name]) ** 2
        found[name] = found[name]._replace(
            **{"int4" if name == INT4 else "int8": cost[treatment] * steps}
        )
    return {name: found[name] for name in encodings}


def _some_rows(weight: Tensor, count: int) -> Tensor:
    n = weight.shape[0]
    if n <= count:
        return dense_rows(weight, slice(None))
    places = [i * n // count for i in range(count)]
    return torch.cat([dense_rows(weight, slice(i, i + 1)) for i in places])


def _led(
    encodings: Mapping[str, Encoding], inputs: InputMoments | None, feedback: bool
) -> dict[str, Encoding]:
    """Led by the inputs; what knows all their pairs is made once for all that share it."""
    if inputs is None:
        return dict(encodings)
    shared: dict[object, object] = {}
    found = {}
    for name, encoding in encodings.items():
        led = encoding.led_by(inputs, feedback=False)
        if feedback and hasattr(led, "feedback"):
            rotation = getattr(encoding, "rotation", None)
            smooth = getattr(encoding, "smooth", None)
            run = encoding.group if isinstance(encoding, PackedInt8) else 1
            key = (rotation, id(smooth), run)
            if key not in shared:
                shared[key] = follow(inputs, smooth, rotation, True, run)
            if led is not encoding or isinstance(encoding, NativeInt8 | PackedInt8 | ConvrotInt4):
                led = replace(led, feedback=shared[key])
        found[name] = led
    return found


class _Energy:
    """Mean square of a linear's outputs, by all that is known of its inputs' products."""

    def __init__(self, inputs: InputMoments | None) -> None:
        self._inputs = inputs
        known = inputs is not None and inputs.blocks is not None
        self._matrix = inputs.matrix() if known else None  # as large as the one that rounding makes

    def lost(self, rows: Tensor, encoding: Encoding) -> float:
        """Relative error energy of the outputs of ``rows``; inf where they cannot be stored."""
        error = encoding.decode(encoding.encode(rows)) - rows
        energy = self._of(rows)
        found = self._of(error) / energy if energy else 0.0
        return found if math.isfinite(found) else math.inf

    def _of(self, rows: Tensor) -> float:
        if self._inputs is None:
            return wide(rows).square().sum().item()
        if self._matrix is None:
            return self._inputs.output_energy(rows)
        rows = wide(rows)
        return (rows @ self._matrix.to(rows) * rows).sum().clamp_min(0).item()


def _inputs_cost(
    rows: Tensor, grid: NativeInt8, stats: LayerStats | None, name: str, energy: _Energy
) -> float:
    """What rounding the inputs adds: the calibrated error of INT8 treated so, rounded to nearest,
    without the part that its weights make."""
    measured = math.nan if stats is None else stats.error(name)
    if math.isnan(measured):
        return _INT8_INPUTS
    weights = energy.lost(rows, grid)
    return max(measured**2 - weights, _LEAST_OF_INPUTS * measured**2)
