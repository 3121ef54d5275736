"""Measure how much of each linear's output error arrives in the final latents.

A picture is sampled as it is, its latents kept. Then one random direction of the final latents is
carried back through all steps, with guidance and through both copies: what it becomes at the
output of a linear says how an error there moves the picture. Multiplied with the error that a
quantized file's weight makes of the very inputs, and summed over tokens and steps, as the errors of
one weight are alike everywhere, that is the part that arrives; rows of a weight are rounded apart,
so theirs add as energies. Rounded inputs err otherwise at every token and step, so that far less of
that arrives, and the more the coarser their steps are; their errors are summed beside the others',
in columns. One walk back measures every linear of both copies, where trying them one
by one would take a picture each.

Memory: the two copies, the inputs of the transformer blocks of one pass, and one block's record:
blocks run again on the way back. The quantized weights stay where they were loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import OpError
from ..ops.fused import dense
from ..ops.rotation import rotate
from ..ops.wide import wide_sum
from ..quant.measure import dense_rows
from ..quant.sensitivity import Part, Sensitivity, Sums
from ..quant.treatments import rotation_group
from ..sampling import StepPlan, grid_size
from .calibrate import Prompt, watched
from .generate import GenerateRequest, Models, initial_noise, sample
from .transformer import Prepared, prepare, recorded_velocity

Progress = Callable[[int, int], None]

_LEAST = 1e-250  # energy of which a logarithm is taken
_SMALLEST = 1e-30
_INPUTS = (127, 7)  # largest codes of inputs rounded to 8 and to 4 bits


@dataclass(frozen=True)
class Probes:
    """Random ``directions`` of a picture's final latents, drawn from ``seed``."""

    directions: int = 2
    seed: int = 0


def measure_sensitivity(
    models: Models,
    quantized: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    request: GenerateRequest,
    *,
    probes: Probes,
    digests: Mapping[str, str],
    settings: Mapping[str, object],
    earlier: Sensitivity | None = None,
    keep: Callable[[Sensitivity], None] = lambda found: None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Gains of the linears that ``quantized`` holds: ``conditional.layers.0.attention.qkv`` -> the
    weight [N, K] as a file has it.

    ``keep`` is given what there is after every picture; with it as ``earlier`` a later run goes on,
    to the same sums. ``request`` gives size, preset, steps and guidance. Raises OpError for a
    weight of another shape or without an error, which would pass for one that does no harm, and if
    ``earlier`` was measured otherwise.
    """
    found = earlier or Sensitivity({}, dict(digests), dict(settings))
    if (dict(found.models), dict(found.settings)) != (dict(digests), dict(settings)):
        raise OpError(
            "the file to go on with was measured otherwise",
            found={"models": found.models, "settings": found.settings},
            needed={"models": dict(digests), "settings": dict(settings)},
        )
    walk = _Walk(models, quantized, request)
    for at, prompt in enumerate(prompts):
        name = f"{at}"
        if name not in found.done:
            sums = walk.back(prompt, probes, at)
            merged = {key: found.linears.get(key, Sums()).plus(sums[key]) for key in sums}
            found = Sensitivity(merged, found.models, found.settings, (*found.done, name))
            keep(found)
        if progress is not None:
            progress(at + 1, len(prompts))
    return found


class _Walk:
    """Forward along the schedule and back."""

    def __init__(
        self, models: Models, quantized: Mapping[str, Tensor], request: GenerateRequest
    ) -> None:
        self.models, self.steps = models, request.plan(one_branch=models.one_branch)
        self.grid = grid_size(request.width, request.height)
        self.unconditional = None
        if models.unconditional is not None:
            self.unconditional = prepare(models.unconditional, *self.grid)
        linears = watched(models)
        self.taps = {key: _Tap(key, linears[key], weight) for key, weight in quantized.items()}

    def back(self, prompt: Prompt, probes: Probes, index: int) -> dict[str, Sums]:
        """What one picture gives for each linear."""
        device = self.models.conditional.embed_image_indicator.weight.device
        conditional = prepare(self.models.conditional, *self.grid, prompt.features[None].to(device))
        channels = self.models.conditional.config.in_channels
        tokens = self.grid[0] * self.grid[1]
        noise = initial_noise(probes.seed + index, tokens, channels)
        walk = sample(self.models, self.steps, noise.to(device), conditional, self.unconditional)
        before = [noise, *(x.cpu() for _, x in walk)]
        size = before.pop().double().norm().item()
        generator = torch.Generator().manual_seed(probes.seed + index)
        torch.randn(noise.shape, generator=generator)  # the picture's own noise is no chance to it
        arrived = {key: [0.0] * len(tap.arrived) for key, tap in self.taps.items()}
        with self._tapped():
            for _ in range(probes.directions):
                direction = torch.randn(noise.shape, generator=generator).to(device) / size
                for tap in self.taps.values():
                    tap.begin()
                for step, latents in zip(reversed(self.steps), reversed(before), strict=True):
                    direction = self._step_back(step, latents.to(device), direction, conditional)
                for key, tap in self.taps.items():
                    arrived[key] = [a + b for a, b in zip(arrived[key], tap.arrived, strict=True)]
        logs = {
            key: [math.log(max(energy / probes.directions, _LEAST)) for energy in energies]
            for key, energies in arrived.items()
        }
        return {key: tap.sums(logs[key]) for key, tap in self.taps.items()}

    def _step_back(
        self, step: StepPlan, x: Tensor, direction: Tensor, conditional: Prepared
    ) -> Tensor:
        """``direction^T (I + (sigma - sigma_next) dv/dx)``, v being the guided velocity."""
        length = step.sigma - step.sigma_next
        if step.unconditional == "reuse":
            raise OpError("sensitivity needs a pass of its own for every step", found="reuse")
        guided = step.unconditional == "run" and self.models.unconditional is not None
        factor = step.guidance if guided else 1.0
        passes = [(self.models.conditional, conditional, factor)]
        if guided:
            passes.append((self.models.unconditional, self.unconditional, 1.0 - factor))
        moved = direction.clone()
        for model, prepared, share in passes:
            moved += _pulled_back(model, x, step.time, prepared, direction * (length * share))
        return moved

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        handles = [tap.attach() for tap in self.taps.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pulled_back(model, x: Tensor, time: float, prepared: Prepared, cotangent: Tensor) -> Tensor:
    """``cotangent^T dv/dx``; on the way every tap is told its gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = recorded_velocity(model, x, time, prepared, _rerun)
        v.backward(cotangent.to(v.dtype))  # not grad(v, x): modulation does not depend on x
    return x.grad


def _rerun(block, *inputs) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False)


class _Tap:
    """Watches one linear on the way back: what arrives of its error, and how large that is."""

    def __init__(self, key: str, module, quantized: Tensor) -> None:
        if tuple(quantized.shape) != tuple(module.weight.shape):
            raise OpError(
                f"{key}: quantized weight of another shape",
                found=list(quantized.shape),
                needed=list(module.weight.shape),
            )
        every = slice(None)
        true, stored = (dense_rows(each, every) for each in (module.weight.data, quantized))
        if bool(true.any()) and torch.equal(stored.to(true), true):
            raise OpError(
                f"{key}: no error to follow, the weight is the model's own",
                found="not quantized, or the model itself",
                needed="a quantized weight of every linear",
                hint="Give files that keep no linear of the blocks as it is: quantize --level W4A8 "
                "without --protect.",
            )
        self._module, self._quantized = module, quantized
        self.begin()

    def begin(self) -> None:
        """Forget what was summed."""
        n, k = self._module.weight.shape
        self._sums = [torch.zeros(size, dtype=torch.float64) for size in (n, *(k for _ in _INPUTS))]
        self._errors = [0.0] * len(self._sums)
        self._signal = 0.0

    @property
    def arrived(self) -> list[float]:
        """Energy in the final latents, along the direction of one walk back: of the weight's error,
        then of inputs rounded to 8 and to 4 bits."""
        return [each.square().sum().item() for each in self._sums]

    def sums(self, logs: Sequence[float]) -> Sums:
        """Of one picture, ``logs`` of what arrived."""
        parts = (Part(*each) for each in zip(logs, self._errors, strict=True))
        return Sums(1, self._signal, *parts)

    def attach(self):
        """Follow the module's outputs until the handle is removed."""
        return self._module.register_forward_hook(self._hook)

    def _hook(self, module, inputs, output: Tensor) -> Tensor:
        return _Follow.apply(output, _anchor(output), dense(inputs[0]).detach(), self._seen)

    def _seen(self, x: Tensor, gradient: Tensor) -> None:
        """x [..., K] was the input, gradient [..., N] is what the direction became at the output;
        an input that all tokens share has one row."""
        every = slice(None)
        true = dense_rows(self._module.weight.data, every)
        off = dense_rows(self._quantized, every).to(true.device) - true
        x, gradient = (each.reshape(-1, each.shape[-1]).float() for each in (x, gradient))
        error = x @ off.t()
        self._add(0, gradient * error, error.square())
        self._signal += wide_sum((x @ true.t()).square()).item()
        group = rotation_group(x.shape[1])
        back, x, true = (
            t if group is None else rotate(t, group) for t in (gradient @ true, x, true)
        )
        energies = true.square().sum(0)
        for place, limit in enumerate(_INPUTS, 1):
            step = x.abs().amax(1, keepdim=True).clamp_min(_SMALLEST) / limit
            error = (x / step).round_().mul_(step).sub_(x)
            self._add(place, back * error, energies * error.square())

    def _add(self, place: int, arriving: Tensor, energy: Tensor) -> None:
        self._sums[place] += wide_sum(arriving, 0).cpu()
        self._errors[place] += wide_sum(energy).item()


def _anchor(like: Tensor) -> Tensor:
    """Makes what depends on nothing that is recorded, as modulation by time, recorded too."""
    return torch.zeros(1, device=like.device, requires_grad=True)


class _Follow(torch.autograd.Function):
    """Its first argument; on the way back ``seen(x, gradient)`` is called."""

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, x: Tensor, seen) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.seen(*ctx.saved_tensors, gradient)
        return gradient, torch.zeros(1, device=gradient.device), None, None
