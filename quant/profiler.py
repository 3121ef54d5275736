"""Watch the linears of a running model: statistics of their inputs, and what quantizing costs.

Two passes over the same prompts. In the first every token is counted; the second knows the maxima,
so it can smooth, and measures each candidate on a sample of tokens and output channels. A smoothing
vector is judged on values that it was not made for: on each prompt the one that all other prompts
give, and on other noise. Channels of w2 that only some words wake decide here: judged on its own
prompts, a vector looks up to 18 dB better than it is. Nothing is kept of an input but sums and
maxima.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.blocks import FORMATS
from ..ops.chunks import row_chunks
from ..ops.fused import Activation, dense
from ..ops.library import without_autocast
from ..ops.reference import int8_linear, smooth_rotate_quantize_rows
from ..ops.wide import wide, wide_sum
from .calibration import Calibration, Run
from .encodings import Blocks
from .errors import CalibrationError, NonFiniteWeightError
from .input_moments import DIRECTIONS, sketch
from .layer_stats import LayerStats
from .loudest import Loudest
from .measure import dense_rows
from .treatments import (
    ALPHAS,
    BLOCK_CANDIDATES,
    Treatment,
    input_group,
    int8_treatments,
    rotation_group,
    smoothing,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfilerOptions:
    """What is measured, and on how much.

    ``tokens`` and ``channels``: how many input rows of a call, and output channels of a linear, the
    errors are measured on; ``alphas``: smoothing strengths; ``blocks``: GGUF types.
    """

    tokens: int = 64
    channels: int = 256
    alphas: tuple[float, ...] = ALPHAS
    blocks: tuple[str, ...] = BLOCK_CANDIDATES


class Profiler:
    """Statistics of ``linears``: ``conditional.layers.0.attention.qkv`` -> module.

    A module has a ``weight`` [N, K], quantized or not (its true values count), and is called with
    its input [..., K] first. ``times``: the model times of the schedule, one column each. Use::

        with profiler.statistics():
            run()                  # calls sample(i) before each prompt, at(time) before each step
        with profiler.errors():
            run()
        profiler.result(run)
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        times: Sequence[float],
        options: ProfilerOptions | None = None,
    ) -> None:
        self.times = tuple(sorted({round(float(time), 6) for time in times}))
        self._options = options or ProfilerOptions()
        self._modules = dict(linears)
        self._seen: dict[str, _Seen] = {}
        self._vectors: dict[str, dict[float, Tensor]] = {}
        self._sample = self._column = 0

    def sample(self, index: int) -> None:
        """What is called from now on belongs to this prompt (or seed, if there is one prompt)."""
        self._sample = index
        self._vectors.clear()

    def at(self, time: float) -> None:
        """What is called from now on belongs to the step nearest this model time."""
        self._column = min(range(len(self.times)), key=lambda i: abs(self.times[i] - time))

    @contextmanager
    def statistics(self) -> Iterator[None]:
        """The first pass: every token of every call is counted."""
        self.sample(0)
        self.at(self.times[0])
        with self._hooks(self._count):
            yield

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The second pass: every candidate is tried on a sample of every call."""
        if any(seen.samples < 2 for seen in self._seen.values()):
            _LOG.warning("one prompt with one seed: smoothing is judged on what it is made for")
        for seen in self._seen.values():
            seen.prepare(self._options)
        self.sample(0)
        self.at(self.times[0])
        with self._hooks(self._measure):
            yield

    def result(self, run: Run) -> Calibration:
        """Everything seen. Raises CalibrationError for a block's linear that was never called, or
        with values that are not finite."""
        silent = [key for key in self._modules if key not in self._seen and ".layers." in key]
        if silent:
            raise CalibrationError(
                f"{len(silent)} linears were never called",
                tensor=silent[0],
                hint="Another patch runs these layers in its own way: take it off to calibrate.",
            )
        loud = [key for key, seen in self._seen.items() if not seen.finite]
        if loud:
            raise CalibrationError(
                "the inputs of this linear are not finite",
                tensor=loud[0],
                hint="The model's values overflow: try bf16 or fp32, or another file.",
            )
        layers = {key: self._seen[key].stats for key in self._modules if key in self._seen}
        return Calibration(layers, self.times, (run,))

    def _smoothing(self, group: str) -> dict[float, Tensor]:
        """The vectors of an input group, by alpha, that all samples but the current one give."""
        if group not in self._vectors:
            members = [
                seen.without(self._sample)
                for key, seen in self._seen.items()
                if input_group(key) == group
            ]
            found = {alpha: smoothing(members, alpha) for alpha in self._options.alphas}
            self._vectors[group] = found
        return self._vectors[group]

    @contextmanager
    def _hooks(self, see) -> Iterator[None]:
        with ExitStack() as stack:
            for key, module in self._modules.items():
                hook = module.register_forward_pre_hook(partial(see, key))
                stack.callback(hook.remove)
            yield

    @torch.no_grad()
    def _count(self, key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if key not in self._seen:
            self._seen[key] = _Seen(key, module.weight, len(self.times), self._options.channels)
        x = _rows(args[0])
        with without_autocast(x.device):
            self._seen[key].count(x, self._sample, self._column, self._options.tokens)

    @torch.no_grad()
    def _measure(self, key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if key in self._seen:
            vectors, x = self._smoothing(input_group(key)), _rows(args[0])
            with without_autocast(x.device):
                self._seen[key].measure(x, vectors, self._column, self._options.tokens)


class _Seen:
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

    def count(self, x: Tensor, sample: int, column: int, tokens: int) -> None:
        """Add the input rows of one call, [T, K]."""
        stats = self.stats
        squares = x.square()
        sums = [wide_sum(power) for power in (x, squares, squares * x, squares.square())]
        peaks = stats.peaks.clone()
        magnitudes = self._sample(x, tokens).abs()
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


def _rows(x: Tensor | Activation) -> Tensor:
    """The input as fp32 rows [T, K]."""
    x = dense(x)
    return x.detach().reshape(-1, x.shape[-1]).float()


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
