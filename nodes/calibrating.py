"""Calibration on the host's models: hooks on their linears while the host's sampler runs, twice."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import comfy.model_management as management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor, nn

from ..checkpoint.canonical import is_linear
from ..checkpoint.copies import COPIES
from ..errors import OpError
from ..quant.calibration import Calibration, Run
from ..quant.calibration_passes import run_passes
from ..quant.profiler import Profiler, ProfilerOptions
from ..quant.provenance import combined_hash, hash_files
from ..quant.source import files_of
from ..version import __version__
from . import injected
from .guidance import Guidance
from .guider import DualCopyGuider
from .latents import TOKEN_PIXELS
from .model_source import header_of, source_of
from .pairing import check_conditioning


class ProfilingGuider(DualCopyGuider):
    """The guider, telling a profiler the model time before each prediction."""

    profiler: Profiler | None = None

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        if self.profiler is not None:
            self.profiler.at(1.0 - float(timestep.flatten()[0]))
        return super().predict_noise(x, timestep, model_options, seed)


def calibrate(
    conditional: comfy.model_patcher.ModelPatcher,
    unconditional: comfy.model_patcher.ModelPatcher | None,
    positives: Sequence[list],
    guidance: Guidance,
    curve: Tensor,
    latent: Tensor,
    seeds: range,
    options: ProfilerOptions | None = None,
    callback: Callable[[int], None] | None = None,
) -> Calibration:
    """Sample each of ``positives`` with each of ``seeds`` along the sigmas ``curve``; watch every
    linear.

    ``latent`` [1, 128, H / 16, W / 16] gives the size. ``callback(steps done)`` counts the steps of
    both passes. The models are as before when it is over, and after a failure too. Raises OpError
    for models that are changed by a LoRA, whichever way, and CalibrationError for linears that
    another patch bypasses.
    """
    models = dict(zip(COPIES, (conditional, unconditional), strict=True))
    models = {copy: patcher for copy, patcher in models.items() if patcher is not None}
    _check_unpatched(models, positives)
    for positive in positives[1:]:  # the guider checks its own
        check_conditioning(conditional, positive)
    guider = ProfilingGuider(conditional, unconditional, positives[0], guidance)
    times = [1.0 - sigma for sigma in curve[:-1].tolist()]
    profiler = Profiler(_linears(models), times, options)
    guider.profiler = profiler
    done = 0

    def step(*_) -> None:
        nonlocal done
        done += 1
        if callback is not None:
            callback(done)

    def sample(index: int, noise: int) -> None:
        guider.inner_set_conds({"positive": positives[index]})
        guider.sample(
            comfy.sample.prepare_noise(latent, noise),
            latent,
            comfy.samplers.sampler_object("euler"),
            curve,
            callback=step,
            disable_pbar=True,
            seed=noise,
        )

    # prompts judge each other's smoothing, and of a single one its seeds do
    run_passes(profiler, len(positives), seeds, sample)
    return profiler.result(_run(models, positives, latent, seeds, len(times)))


def encode(clip: comfy.sd.CLIP, captions: Sequence[str]) -> list[list]:
    """A conditioning of each caption, in main memory; a cancel ends it between two."""
    found = []
    for caption in captions:
        management.throw_exception_if_processing_interrupted()
        found.append(clip.encode_from_tokens_scheduled(clip.tokenize(caption)))
    return found


def _check_unpatched(
    models: dict[str, comfy.model_patcher.ModelPatcher], positives: Sequence[list]
) -> None:
    """What would be calibrated is what the files hold: OpError for weights changed on top of it."""
    found = {copy: list(_changes(patcher)) for copy, patcher in models.items()}
    options = (options for positive in positives for _, options in positive)
    found["caption"] = ["a LoRA hook" for each in options if each.get("hooks")]
    for where, changes in found.items():
        if changes:
            raise OpError(
                f"the {where} brings a LoRA or another change of the weights",
                found=", ".join(changes),
                needed="the model as it will be quantized",
                hint="Take the LoRA off to calibrate.",
            )


def _changes(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[str]:
    """Each way in which the host lets a node change what a model's linears give."""
    if patcher.patches:
        yield f"{len(patcher.patches)} patched weights"
    if patcher.weight_wrapper_patches:
        yield f"{len(patcher.weight_wrapper_patches)} wrapped weights"
    yield from (f"paths beside the weights ({key})" for key in injected.changing(patcher))


def _linears(models: dict[str, comfy.model_patcher.ModelPatcher]) -> dict[str, nn.Module]:
    """Every linear by copy and canonical name, which the host's modules have."""
    return {
        f"{copy}.{name}": module
        for copy, patcher in models.items()
        for name, module in patcher.model.diffusion_model.named_modules()
        if is_linear(f"{name}.weight") and getattr(module, "weight", None) is not None
    }


def _run(
    models: dict[str, comfy.model_patcher.ModelPatcher],
    positives: Sequence[list],
    latent: Tensor,
    seeds: range,
    steps: int,
) -> Run:
    digests = {}
    for copy, patcher in models.items():
        source = source_of(patcher)
        if source is not None:  # of another loader: the weights themselves are compared then
            digests[copy] = combined_hash(hash_files(files_of(header_of(source))))
    features = hashlib.sha256()
    for text, _ in itertools.chain.from_iterable(positives):
        if text is not None:
            features.update(text.detach().float().cpu().contiguous().numpy().tobytes())
    height, width = (side * TOKEN_PIXELS for side in latent.shape[-2:])
    return Run(
        models=digests,
        prompts_sha256=features.hexdigest(),
        prompts=sum(map(len, positives)),
        seeds=tuple(seeds),
        steps=steps,
        width=width,
        height=height,
        versions={"ideogram4-quant": __version__, "torch": torch.__version__},
    )
