"""What storing a weight cost: SQNR in dB and the largest error, summed chunk by chunk."""

from __future__ import annotations

import math

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..checkpoint.stored_rows import StoredRows
from ..ops.chunks import row_chunks
from ..ops.native.encode import Lost, encoder_for
from ..ops.wide import wide
from .input_moments import InputMoments


class ErrorMeter:
    """``10 log10(sum(w^2) / sum((w - w')^2))`` and ``max |w - w'|`` over any number of chunks.

    Where a calibration tells the inputs x apart, ``10 log10(sum((w x)^2) / sum((w x - w' x)^2))``
    too: rounding with error feedback spends the first on the second.
    """

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.max_abs_error = 0.0
        self.output_signal = 0.0
        self.output_noise = 0.0

    def add(self, weight: Tensor, stored: Tensor, inputs: InputMoments | None = None) -> None:
        """Count one chunk: the true values and what the file gives back, same shape, any float."""
        encoder = encoder_for(weight) if inputs is None else None
        found = None if encoder is None else encoder.lost(weight, stored)
        if found is not None:
            self.count(found)
            return
        error = stored.float() - weight.float()
        self.signal += _sum_of_squares(weight)
        self.noise += _sum_of_squares(error)
        if inputs is not None:
            self.output_signal += inputs.output_energy(weight)
            self.output_noise += inputs.output_energy(error)
        if error.numel():
            low, high = torch.aminmax(error)
            self._largest(max(high.item(), -low.item()))

    def count(self, lost: Lost) -> None:
        """Count a chunk whose sums are known."""
        self.signal += lost.signal
        self.noise += lost.noise
        self._largest(lost.largest)

    def merge(self, other: ErrorMeter) -> None:
        """Count everything that ``other`` counted."""
        self.signal += other.signal
        self.noise += other.noise
        self.output_signal += other.output_signal
        self.output_noise += other.output_noise
        self._largest(other.max_abs_error)

    def _largest(self, error: float) -> None:
        """Keep the larger one; NaN wins and stays."""
        if math.isnan(error) or error > self.max_abs_error:
            self.max_abs_error = error

    def to_list(self) -> list[float]:
        """What :meth:`of` takes."""
        return [
            self.signal, self.noise, self.max_abs_error, self.output_signal, self.output_noise,
        ]  # fmt: skip

    @classmethod
    def of(cls, sums: object) -> ErrorMeter | None:
        """The meter that gave these sums; None for what no meter gave."""
        meter = cls()
        kinds = [type(each) for each in sums] if isinstance(sums, list) else []
        if kinds != [float] * len(meter.to_list()):
            return None
        meter.signal, meter.noise, meter.max_abs_error, *outputs = sums
        meter.output_signal, meter.output_noise = outputs
        return meter

    @property
    def sqnr_db(self) -> float:
        """In dB: inf if nothing was lost, -inf if nothing but error is left, NaN if not finite."""
        return _decibels(self.signal, self.noise)

    @property
    def output_db(self) -> float | None:
        """The outputs' SQNR, as the calibration foretells it, rather too low than too high; None
        without one."""
        return _decibels(self.output_signal, self.output_noise) if self.output_signal else None


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def _sum_of_squares(values: Tensor) -> float:
    """In fp64: squares of tiny weights must not vanish. A dot product is the fastest way there."""
    flat = wide(values).reshape(-1)
    return torch.dot(flat, flat).item()


def stored_rows(tensor: Tensor | StoredRows, rows: slice) -> Tensor:
    """Rows of a tensor: quantized ones in fp32, others as they are."""
    # a subclass cannot be sliced in inference mode, in which threads encode
    with torch.inference_mode(False), torch.no_grad():
        part = tensor[rows]
    return part.dequantize().float() if isinstance(part, QuantizedTensor) else part


def dense_rows(tensor: Tensor | StoredRows, rows: slice) -> Tensor:
    """Rows of a tensor, quantized or not, in fp32."""
    return stored_rows(tensor, rows).to(torch.float32)


def channel_absmax(weight: Tensor | StoredRows) -> Tensor:
    """``max over n of |w[n, k]|``, fp32 [K], of a weight [N, K], quantized or not."""
    found = [dense_rows(weight, rows).abs().amax(0) for rows in row_chunks(tuple(weight.shape))]
    return torch.stack(found).amax(0)
