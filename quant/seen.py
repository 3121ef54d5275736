"""What is summed and measured of one linear while a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..ops.blocks import FORMATS
from ..ops.chunks import row_chunks
from ..ops.reference import int8_linear, smooth_rotate_quantize_rows
from ..ops.rotation import rotate
from ..ops.wide import wide, wide_sum
from .encodings import Blocks
from .errors import NonFiniteWeightError
from .input_moments import BLOCK, DIRECTIONS, block_sums, sketch
from .layer_stats import LayerStats
from .loudest import Loudest
from .measure import dense_rows
from .treatments import (
    ALPHAS,
    BLOCK_CANDIDATES,
    ROTATED_INPUTS,
    Treatment,
    int8_treatments,
    rotation_group,
)


@dataclass(frozen=True)
class ProfilerOptions:
    """What is measured, and on how much.

    ``tokens`` and ``channels``: how many input rows of a call, and output channels of a linear, the
    errors are measured on; ``alphas``: smoothing strengths; ``blocks``: GGUF types; ``moments``:
    how many neighbouring inputs' products are summed, for rounding; 0 leaves the sketch alone.
    """

    tokens: int = 64
    channels: int = 256
    alphas: tuple[float, ...] = ALPHAS
    blocks: tuple[str, ...] = BLOCK_CANDIDATES
    moments: int = BLOCK


class Seen:
    """One linear: its statistics so far, and the output channels that errors are measured on."""

    def __init__(self, key: str, weight: Tensor, columns: int, channels: int) -> None:
        n, k = weight.shape
        absmax, self._weight = _look_at(weight, channels)
        if not bool(absmax.isfinite().all()):
            raise NonFiniteWeightError(
                "holds values that are not finite",
                tensor=f"{key}.weight",
                found=f"{absmax[~absmax.isfinite()][0].item()}",
                needed="finite values",
                hint="The model is damaged, or its training diverged.",
            )
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.stats = LayerStats(
            shape=(n, k),
            tokens=0,
            absmax=torch.zeros(k),
            square_sum=zeros(k),
            sketch=torch.zeros(k, DIRECTIONS),
            weight_absmax=absmax,
            power_sums=zeros(4),
            peaks=zeros(3, columns),
            signal=zeros(columns),
        )
        self._loudest = Loudest(k)
        self._calls = 0
        self._int8: list[Treatment] = []
        self._blocks: dict[str, Tensor] = {}

    @property
    def samples(self) -> int:
        return self._loudest.samples

    @property
    def finite(self) -> bool:
        """Whether all inputs were, and what is summed of them."""
        sums = self.stats.absmax, self.stats.square_sum, self.stats.sketch
        return all(bool(each.isfinite().all()) for each in sums)

    def without(self, sample: int) -> LayerStats:
        """The statistics with the maxima of all samples but this one."""
        return replace(self.stats, absmax=self._loudest.without(sample))

    def count(self, x: Tensor, sample: int, column: int, options: ProfilerOptions) -> None:
        """Add the input rows of one call, [T, K]."""
        stats = self.stats
        squares = x.square()
        sums = [wide_sum(power) for power in (x, squares, squares * x, squares.square())]
        peaks = stats.peaks.clone()
        magnitudes = self._sample(x, options.tokens).abs()
        median = magnitudes.median(dim=1).values
        ratios = (magnitudes.amax(1) / median)[median > 0].cpu().double()
        if len(ratios):
            peaks[:2, column] += torch.stack([ratios.new_tensor(float(len(ratios))), ratios.sum()])
            peaks[2, column] = max(peaks[2, column].item(), ratios.max().item())
        self._loudest.add(x.abs().amax(0).cpu(), sample)
        self.stats = replace(
            stats,
            tokens=stats.tokens + len(x),
            absmax=self._loudest.absmax,
            square_sum=stats.square_sum + wide_sum(squares, 0),
            sketch=stats.sketch + sketch(x).cpu(),
            power_sums=stats.power_sums + torch.stack(sums),
            peaks=peaks,
        )
        if options.moments:
            added = block_sums(x, options.moments).cpu()
            # in place: it is the one large sum
            self.stats = replace(
                self.stats,
                blocks=added if stats.blocks is None else stats.blocks.add_(added),
            )

    def prepare(self, options: ProfilerOptions) -> None:
        """Get ready to measure."""
        k = self.stats.shape[1]
        rotatable = rotation_group(k) is not None
        self._int8 = [t for t in int8_treatments(options.alphas) if rotatable or not t.rotated]
        # Search makes blocks slow to encode: once. INT8 is encoded at each call, for memory's sake.
        fitting = [qtype for qtype in options.blocks if k % FORMATS[qtype].block_size == 0]
        self._blocks = {
            qtype: Blocks(qtype, tuple(self._weight.shape)).encode(self._weight.float())["weight"]
            for qtype in fitting
        }
        names = [treatment.name for treatment in self._int8] + fitting
        names += [ROTATED_INPUTS] if rotatable else []
        zeros = torch.zeros_like(self.stats.signal)
        self.stats = replace(
            self.stats, signal=zeros, noise={name: zeros.clone() for name in names}
        )

    def measure(self, x: Tensor, vectors: Mapping[float, Tensor], column: int, tokens: int) -> None:
        """Try every candidate on a sample of one call's input rows [T, K]; smoothing by alpha."""
        x = self._sample(x, tokens)
        weight = self._weight.to(x.device).float()
        wanted = x @ weight.T
        self.stats.signal[column] += wide(wanted).square().sum().cpu()
        for treatment in self._int8:
            smooth = vectors.get(treatment.alpha)
            smooth = None if smooth is None else smooth.to(x.device)
            group = rotation_group(x.shape[1]) if treatment.rotated else None
            columns = weight if smooth is None else weight * smooth
            q, scale = smooth_rotate_quantize_rows(columns, None, group)
            found = int8_linear(x, q, scale, smooth=smooth, rotation=group)
            self._add(treatment.name, column, found - wanted)
        group = rotation_group(x.shape[1])
        if group is not None:
            q, scale = smooth_rotate_quantize_rows(x, None, group)
            rounded = rotate(q.float() * scale[:, None], group)
            self._add(ROTATED_INPUTS, column, (rounded - x) @ weight.T)
        for qtype, blocks in self._blocks.items():
            decoded = Blocks(qtype, tuple(weight.shape)).decode({"weight": blocks.to(x.device)})
            self._add(qtype, column, x @ decoded.T - wanted)

    def _add(self, name: str, column: int, error: Tensor) -> None:
        self.stats.noise[name][column] += wide(error).square().sum().cpu()

    def _sample(self, x: Tensor, tokens: int) -> Tensor:
        """Up to ``tokens`` rows, evenly spaced, starting elsewhere at each call."""
        self._calls += 1
        if len(x) <= tokens:
            return x
        places = (torch.arange(tokens) * len(x)) // tokens
        return x[(places + 7 * self._calls) % len(x)]


def _look_at(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(``max |w|`` of each input channel fp32 [K], evenly spaced rows [<= channels, K] in bf16 or,
    where that would round them, fp32), both on the CPU."""
    weight = weight.detach()
    n = weight.shape[0]
    chosen = torch.arange(n) if n <= channels else (torch.arange(channels) * n) // channels
    absmax, rows = torch.zeros(weight.shape[1]), []
    for part in row_chunks(tuple(weight.shape)):
        values = dense_rows(weight, part).cpu()
        absmax = torch.maximum(absmax, values.abs().amax(0))
        rows.append(values[chosen[(chosen >= part.start) & (chosen < part.stop)] - part.start])
    sample = torch.cat(rows)
    half = sample.bfloat16()
    return absmax, half if torch.equal(half.float(), sample) else sample
