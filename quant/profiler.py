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
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.fused import Activation, dense
from ..ops.library import without_autocast
from .calibration import Calibration, Run
from .errors import CalibrationError
from .seen import ProfilerOptions, Seen
from .treatments import (
    input_group,
    smoothing,
)

_LOG = logging.getLogger(__name__)


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
        self._seen: dict[str, Seen] = {}
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
            self._seen[key] = Seen(key, module.weight, len(self.times), self._options.channels)
        x = _rows(args[0])
        with without_autocast(x.device):
            self._seen[key].count(x, self._sample, self._column, self._options)

    @torch.no_grad()
    def _measure(self, key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if key in self._seen:
            vectors, x = self._smoothing(input_group(key)), _rows(args[0])
            with without_autocast(x.device):
                self._seen[key].measure(x, vectors, self._column, self._options.tokens)


def _rows(x: Tensor | Activation) -> Tensor:
    """The input as fp32 rows [T, K]."""
    x = dense(x)
    return x.detach().reshape(-1, x.shape[-1]).float()
