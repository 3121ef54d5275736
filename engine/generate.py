"""One prompt, one seed, one picture: encode, sample with both copies, decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import Ideogram4Transformer2DModel
from PIL import Image
from torch import Tensor

from ..checkpoint.copies import COPIES
from ..errors import OpError
from ..ops.finite import check_latents
from ..sampling import (
    StepPlan,
    combine,
    euler_step,
    grid_size,
    guidance_schedule,
    plan,
    preset,
    sigmas,
    start_latents,
)
from .encoder import TextEncoder
from .transformer import Prepared, prepare, velocity
from .vae import Vae

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Callback = Callable[[StepPlan, Tensor], None]


@dataclass(frozen=True)
class GenerateRequest:
    """What to paint. ``steps`` and ``guidance`` override the preset's.

    ``denoise`` < 1 needs a picture to start from. ``interval`` and ``reuse`` save unconditional
    passes and change the picture: see `sampling.plan`. ``mu`` and ``last_sigma`` go before the
    preset's schedule, in what tools disagree on for one branch. ``keep_latents`` keeps every step's
    latents.
    """

    prompt: str
    width: int = 1024
    height: int = 1024
    seed: int = 0
    preset: str = "default"
    steps: int | None = None
    guidance: float | tuple[float, ...] | None = None
    denoise: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    reuse: int = 1
    keep_latents: bool = False
    mu: float | None = None
    last_sigma: float = 0.0

    @property
    def guided(self) -> bool:
        """Whether it asks for guidance, by its own factors or by its preset."""
        return self.guidance is not None or preset(self.preset).guided

    def plan(self, *, one_branch: bool = False) -> tuple[StepPlan, ...]:
        """The steps of this request; OpError for settings that do not fit.

        one_branch: the model holds its guidance in itself, so a preset's is left out and factors
        other than 1 are refused.
        """
        chosen = preset(self.preset)
        factors = guidance_schedule(chosen, self.steps, self.guidance)
        if one_branch:
            if self.guidance is not None and any(factor != 1.0 for factor in factors):
                raise OpError(
                    "guidance is asked of a model of one branch, which holds it in itself",
                    found=self.guidance,
                    needed="no guidance, or 1",
                    hint="Leave --guidance out, or say --branches two for one of two copies.",
                )
            factors = (1.0,) * len(factors)
        mu = chosen.mu if self.mu is None else self.mu
        schedule = sigmas(
            len(factors), self.width, self.height, mu, chosen.std, self.denoise, self.last_sigma
        )
        return plan(schedule, factors, interval=self.interval, reuse=self.reuse)


@dataclass(frozen=True)
class Models:
    """What makes a picture. Without ``unconditional`` there is no guidance, which ``one_branch``
    needs none of; ``encoder`` may be None where features are given, ``vae`` where nothing is
    decoded."""

    conditional: Ideogram4Transformer2DModel
    unconditional: Ideogram4Transformer2DModel | None
    encoder: TextEncoder | None
    vae: Vae | None
    one_branch: bool = False


@dataclass(frozen=True)
class GenerateResult:
    """A picture, its final latents [N, C] (fp32, CPU), and how long each stage took in seconds.

    ``trajectory`` holds the latents after every step where the request asked for them.
    """

    image: Image.Image
    latents: Tensor
    steps: tuple[StepPlan, ...]
    seconds: dict[str, float]
    trajectory: tuple[Tensor, ...] = field(default=())


def initial_noise(seed: int, tokens: int, channels: int) -> Tensor:
    """Standard normal [1, N, C], fp32, drawn on the CPU: the same for a seed on every device.

    diffusers' pipeline draws the same with ``torch.Generator().manual_seed(seed)``.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, tokens, channels), generator=generator, dtype=torch.float32)


@torch.no_grad()
def sample(
    models: Models,
    steps: Sequence[StepPlan],
    x: Tensor,
    conditional: Prepared,
    unconditional: Prepared | None,
) -> Iterator[tuple[StepPlan, Tensor]]:
    """Euler along ``steps`` from x [B, N, C] fp32; yields every step with the latents after it."""
    v_uncond = None
    for step in steps:
        v = velocity(models.conditional, x, step.time, conditional)
        if step.unconditional != "skip" and models.unconditional is not None:
            if step.unconditional == "run":
                v_uncond = velocity(models.unconditional, x, step.time, unconditional)
            v = combine(v, v_uncond, step.guidance)
        x = euler_step(x, v, step.sigma, step.sigma_next)
        yield step, x


def generate(
    request: GenerateRequest,
    models: Models,
    progress: Progress | None = None,
    callback: Callback | None = None,
    *,
    features: Tensor | None = None,
    noise: Tensor | None = None,
    init_image: Image.Image | None = None,
) -> GenerateResult:
    """The picture of one request; the same request gives the same picture.

    ``progress(steps done, steps)`` and ``callback(step, latents)`` are called after every step.
    ``features`` [L, llm_features_dim] stand in for the encoder, ``noise`` [1, N, C] for the seed;
    ``init_image`` is resized to the request's size. OpError for settings that do not fit, a warning
    where there is nothing to guide away from; OpError, too, for a picture that came out as no
    numbers, with the weight that did it. `sampling.check_size` says which sizes were trained.
    """
    steps = request.plan(one_branch=models.one_branch)
    check_branches(request, models.one_branch, models.unconditional is not None)
    if request.denoise < 1.0 and init_image is None:
        raise OpError("denoise below 1 needs a picture to start from", found=request.denoise)
    if models.unconditional is None and any(s.unconditional != "skip" for s in steps):
        _log.warning("no unconditional copy: sampling without guidance")
    rows, columns = grid_size(request.width, request.height)
    weight = models.conditional.embed_image_indicator.weight
    seconds: dict[str, float] = {}

    with _timed(seconds, "encode", weight.device):
        if features is None:
            if models.encoder is None:
                raise OpError("neither an encoder nor features are given")
            features = models.encoder.encode([request.prompt])[0]
        conditional = prepare(models.conditional, rows, columns, features[None].to(weight.device))
        unconditional = None
        if models.unconditional is not None:
            unconditional = prepare(models.unconditional, rows, columns)
        clean = None if init_image is None else _clean_latents(init_image, request, models.vae)

    with _timed(seconds, "sample", weight.device):
        shape = (rows * columns, models.conditional.config.in_channels)
        x = initial_noise(request.seed, *shape) if noise is None else noise
        if x.shape != (1, *shape):
            raise OpError("noise of the wrong shape", found=list(x.shape), needed=[1, *shape])
        x = start_latents(x.to(weight.device, torch.float32), clean, steps[0].sigma)
        latents, trajectory = x, []
        for step, latents in sample(models, steps, x, conditional, unconditional):
            if request.keep_latents:
                trajectory.append(latents[0].cpu())
            if callback is not None:
                callback(step, latents)
            if progress is not None:
                progress(step.index + 1, len(steps))
        copies = (models.conditional, models.unconditional)
        check_latents(latents, dict(zip(COPIES, copies, strict=True)))

    with _timed(seconds, "decode", weight.device):
        image = models.vae.decode(latents, rows, columns)[0]
    return GenerateResult(image, latents[0].cpu(), steps, seconds, tuple(trajectory))


def check_branches(request: GenerateRequest, one_branch: bool, second_copy: bool) -> None:
    """OpError for a second copy, or a stand-in for it, that nothing will run; a warning for a
    preset without its model."""
    chosen = preset(request.preset)
    if second_copy and (one_branch or not request.guided):
        raise OpError(
            "the model is of one branch, which needs no guidance"
            if one_branch
            else f"the preset {chosen.name} runs without guidance",
            found="an unconditional copy, or what stands in for it, which would only cost memory",
            hint="Leave --uncond and --uncond-lora out; "
            + (
                "if the model is one of two copies, say so: generate --branches two, or its name."
                if one_branch
                else "or pick the preset default, turbo or quality."
            ),
        )
    if not request.guided and not one_branch:
        _log.warning(
            "the preset %s is made for %s, and nothing says that this model is one: expect a "
            "worse picture (--branches one says that it is)",
            chosen.name,
            chosen.needs,
        )


def _clean_latents(image: Image.Image, request: GenerateRequest, vae: Vae) -> Tensor:
    size = (request.width, request.height)
    if image.size != size:
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return vae.encode(image)


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    yield
    seconds[stage] = now() - started
