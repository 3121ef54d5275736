"""Ideogram 4 Sampler: noise, schedule, guidance and sampling in one."""

from __future__ import annotations

import logging
import time
from collections import Counter

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io
from torch import Tensor

from ..sampling import check_size
from . import one_copy
from . import residency as residency_kinds
from .costs import without_guidance
from .fused_blocks import status
from .guider import DualCopyGuider
from .latents import TOKEN_PIXELS, check_latent, empty_latent
from .sampling_inputs import (
    PRESET_MU,
    ZERO,
    denoise_input,
    guidance_inputs,
    make_guidance,
    model_inputs,
    preset_input,
    schedule,
    size_inputs,
    steps_input,
    unsettled_inputs,
)
from .schema import CATEGORY

logger = logging.getLogger(__name__)


class Sampler(io.ComfyNode):
    """Both copies and a caption -> LATENT, with the reference's schedule and guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantSampler",
            display_name="Ideogram 4 Sampler",
            category=CATEGORY,
            description=(
                "Samples with the reference's schedule and guidance, all in one node. Connect a "
                "latent for image to image or inpainting; else width and height decide."
            ),
            search_aliases=["ksampler", "sampler", "ideogram sampler", "text to image"],
            inputs=_inputs(),
            outputs=[
                io.Latent.Output(
                    id="latent_out", display_name="latent", tooltip="Connect it to VAE Decode."
                ),
                io.String.Output(
                    id="report",
                    display_name="report",
                    tooltip="Steps, passes of each copy, time, and what was saved or skipped.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        conditional,
        positive,
        preset: str,
        seed: int,
        width: int = 1024,
        height: int = 1024,
        batch_size: int = 1,
        unconditional=None,
        latent=None,
        denoise: float = 1.0,
        steps: int = 0,
        sampler_name: str = "euler",
        residency: str = "auto",
        unconditional_from: str = one_copy.INPUT,
        sigmas=None,
        schedule_mu: str = PRESET_MU,
        last_sigma: str = ZERO,
        **guidance,
    ) -> io.NodeOutput:
        if latent is None:
            check_size(width, height)
            latent = {"samples": empty_latent(width, height, batch_size)}
        chosen = make_guidance(preset, **guidance)
        guider = DualCopyGuider(
            conditional, unconditional, positive, chosen, residency, unconditional_from
        )
        started = time.perf_counter()
        samples = comfy.sample.fix_empty_latent_channels(
            guider.model_patcher, latent["samples"], latent.get("downscale_ratio_spacial")
        )
        check_latent(samples)
        height, width = (side * TOKEN_PIXELS for side in samples.shape[-2:])
        warnings = check_size(width, height)
        for warning in warnings:
            logger.warning(warning)
        curve = sigmas
        if curve is None:
            curve, _ = schedule(preset, width, height, steps, denoise, schedule_mu, last_sigma)
        samples = _sample(guider, {**latent, "samples": samples}, curve, seed, sampler_name)
        seconds = time.perf_counter() - started
        out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        lines = [f"{len(curve) - 1} steps at {width}x{height}, {seconds:.1f} s", *warnings]
        lines += _report(guider, curve)
        return io.NodeOutput({**out, "samples": samples}, "\n".join(lines))


def _sample(
    guider: DualCopyGuider, latent: dict, curve: Tensor, seed: int, sampler_name: str
) -> Tensor:
    """Latents [B, 128, H / 16, W / 16] along the sigmas, through the host's own sampling."""
    samples = latent["samples"]
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    out = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler_name),
        curve,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(guider.model_patcher, len(curve) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return out.to(management.intermediate_device())


def _report(guider: DualCopyGuider, curve: Tensor) -> list[str]:
    """What ran, and what was saved."""
    plan = guider.guidance.plan(curve.tolist())
    steps = len(plan)
    fused = _fused_lines(guider)
    if guider.one_branch is not None or (guider.said and guider.unconditional is None):
        return [f"passes: {steps} conditional", *guider.said, *fused]
    if guider.unconditional is None:
        without = without_guidance()
        return [f"without guidance, as no unconditional copy is connected: {without}", *fused]
    count = Counter(step.unconditional for step in plan)
    lines = [f"passes: {steps} conditional, {count['run']} unconditional"]
    saved = steps - count["run"]
    if saved:
        reasons = [f"{count[k]} {word}" for k, word in _SAVINGS.items() if count[k]]
        lines.append(f"saved {saved / (2 * steps):.0%} of the passes: {', '.join(reasons)}")
    how = one_copy.stands_in(guider.unconditional)
    lines += [] if how is None else [f"unconditional: {how}"]
    return [*lines, f"copies on the device: {_kept(guider)}", *fused]


def _kept(guider: DualCopyGuider) -> str:
    if not guider.one_copy:
        return guider.kept
    return "one, for both passes" if guider.kept == residency_kinds.BOTH else guider.kept


def _fused_lines(guider: DualCopyGuider) -> list[str]:
    """How the blocks of each copy ran, where they were patched to run fused."""
    copies = {"conditional": guider.model_patcher, "unconditional": guider.unconditional}
    found = ((copy, status(patcher)) for copy, patcher in copies.items() if patcher is not None)
    return [f"fused blocks, {copy}: {text}" for copy, text in found if text is not None]


_SAVINGS = {"reuse": "reused", "skip": "skipped at guidance 1"}


def _inputs() -> list:
    return [
        *model_inputs(),
        preset_input(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The same seed, files and settings give the same picture. Torch's generator "
            "on the CPU, which makes the noise, takes the low 32 bits of a seed: seeds that differ "
            "by 4294967296 give the same noise.",
        ),
        *size_inputs(optional=True),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip="Pictures at once, each from its own noise. Not used where a latent is "
            "connected.",
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="A picture to start from (VAE Encode), with its mask for inpainting.",
        ),
        denoise_input(),
        steps_input(),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSAMPLER_NAMES,
            default="euler",
            optional=True,
            advanced=True,
            tooltip="The reference uses euler.",
        ),
        *guidance_inputs(),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="Your own schedule, from any scheduler node; it goes before the preset's "
            "sigmas, steps and denoise.",
        ),
        *unsettled_inputs(),
    ]
