"""What is known of one linear: its inputs, and what quantizing it alone would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ops.wide import wide
from .input_moments import InputMoments, input_moments, sketch


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One linear ``[N, K]`` of one copy; S is the number of columns (steps) of the calibration.

    - ``tokens``: input rows seen.
    - ``absmax`` fp32 [K]: the largest ``|x|`` of each input channel; ``square_sum`` fp64 [K].
    - ``sketch`` fp32 [K, r]: their products summed, ``sum over tokens of x (x . signs)``, of which
      ``moments`` makes the directions of most energy.
    - ``weight_absmax`` fp32 [K]: the largest ``|w|`` of each input channel.
    - ``power_sums`` fp64 [4]: sums of x, x^2, x^3, x^4 over all values of all channels.
    - ``peaks`` fp64 [3, S]: sampled tokens, sum and largest of their peak-to-median ratios.
    - ``signal`` fp64 [S]: the output's sum of squares over the sampled tokens and channels;
      ``noise``: candidate -> fp64 [S], the same of the output's error if this linear alone were
      quantized so.
    - ``blocks`` fp32 [G, B, B]: the products of B neighbouring inputs each, summed, or None; see
      ``input_moments.block_sums``.
    """

    shape: tuple[int, int]
    tokens: int
    absmax: Tensor
    square_sum: Tensor
    sketch: Tensor
    weight_absmax: Tensor
    power_sums: Tensor
    peaks: Tensor
    signal: Tensor
    noise: Mapping[str, Tensor] = field(default_factory=dict)
    blocks: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, weight: Tensor) -> LayerStats:
        """The statistics, without errors, of ``inputs`` [tokens, K] into ``weight`` [N, K]."""
        x = wide(inputs)
        return cls(
            shape=tuple(weight.shape),
            tokens=x.shape[0],
            absmax=x.abs().amax(0).float(),
            square_sum=x.square().sum(0),
            sketch=sketch(inputs.float()),
            weight_absmax=weight.float().abs().amax(0),
            power_sums=torch.stack([x.pow(k).sum() for k in range(1, 5)]),
            peaks=torch.zeros(3, 1, dtype=torch.float64),
            signal=torch.zeros(1, dtype=torch.float64),
        )

    @property
    def moments(self) -> InputMoments | None:
        """Which inputs are loud, and which together; None if all of them were zero."""
        return input_moments(self.square_sum, self.sketch, self.tokens, self.blocks)

    @property
    def kurtosis(self) -> float:
        """``E[(x - m)^4] / E[(x - m)^2]^2`` over all values: 3 for a gaussian; NaN if constant."""
        count = self.tokens * self.shape[1]
        if not count:
            return math.nan
        m, m2, m3, m4 = (self.power_sums / count).tolist()
        variance = m2 - m * m
        if variance <= 1e-12 * m2:
            return math.nan
        square = m * m  # products overflow to infinity, where powers raise
        return (m4 - 4 * m * m3 + 6 * square * m2 - 3 * square * square) / (variance * variance)

    @property
    def peak_to_median(self) -> Tensor:
        """Mean over tokens of ``max |x| / median |x|`` at each step, fp64 [S]; NaN if unseen."""
        return self.peaks[1] / self.peaks[0]

    @property
    def largest_peak(self) -> float:
        """The largest ``max |x| / median |x|`` of any sampled token; 0 if none was sampled."""
        return self.peaks[2].max().item()

    @property
    def errors(self) -> dict[str, Tensor]:
        """Candidate -> ``||y' - y|| / ||y||`` at each step, fp64 [S]; NaN if unseen."""
        return {name: (noise / self.signal).sqrt() for name, noise in self.noise.items()}

    def error(self, candidate: str) -> float:
        """``||y' - y|| / ||y||`` over all steps; NaN if the candidate was not measured here."""
        noise = self.noise.get(candidate)
        signal = self.signal.sum().item()
        if noise is None or signal == 0:
            return math.nan
        return math.sqrt(noise.sum().item() / signal)

    def sqnr_db(self, candidate: str) -> float:
        """``-20 log10(error)``: inf without an error, NaN if the candidate was not measured."""
        error = self.error(candidate)
        return math.inf if error == 0 else -20 * math.log10(error)

    def spread_over(self, places: Tensor, columns: int) -> LayerStats:
        """The same with ``columns`` columns: column i at ``places[i]``, the others empty."""

        def spread(values: Tensor) -> Tensor:
            wide = values.new_zeros((*values.shape[:-1], columns))
            wide[..., places] = values
            return wide

        return replace(
            self,
            peaks=spread(self.peaks),
            signal=spread(self.signal),
            noise={name: spread(noise) for name, noise in self.noise.items()},
        )

    def plus(self, other: LayerStats) -> LayerStats:
        """Both together; a candidate counts where both measured it, for its signal is shared."""
        both = [name for name in self.noise if name in other.noise]
        if not self.noise or not other.noise:
            both = [*self.noise, *other.noise]
        zero = torch.zeros_like(self.signal)
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            absmax=torch.maximum(self.absmax, other.absmax),
            square_sum=self.square_sum + other.square_sum,
            sketch=self.sketch + other.sketch,
            weight_absmax=torch.maximum(self.weight_absmax, other.weight_absmax),
            power_sums=self.power_sums + other.power_sums,
            peaks=torch.cat(
                [self.peaks[:2] + other.peaks[:2], torch.maximum(self.peaks, other.peaks)[2:]]
            ),
            signal=self.signal + other.signal,
            noise={n: self.noise.get(n, zero) + other.noise.get(n, zero) for n in both},
            blocks=_sum_of_blocks(self.blocks, other.blocks),
        )


def _sum_of_blocks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """None unless both runs summed the same blocks: half of the tokens would pass for all."""
    if first is None or second is None or first.shape != second.shape:
        return None
    return first + second
