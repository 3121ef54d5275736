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
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sampling import check_size, sigmas
from ..sampling import preset as find_preset
from .guidance import Guidance
from .guider import DualCopyGuider
from .node_guider import guidance_inputs, make_guidance
from .schema import CATEGORY

logger = logging.getLogger(__name__)
TOKEN_PIXELS = 16
LATENT_CHANNELS = 128


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
        **guidance,
    ) -> io.NodeOutput:
        if latent is None:
            check_size(width, height)
            latent = {"samples": _empty_latent(width, height, batch_size)}
        chosen = make_guidance(preset, **guidance)
        guider = DualCopyGuider(conditional, unconditional, positive, chosen, residency)
        started = time.perf_counter()
        samples, curve = _sample(guider, latent, preset, seed, denoise, steps, sampler_name)
        seconds = time.perf_counter() - started
        out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        text = _report(guider, chosen, curve, samples, seconds)
        return io.NodeOutput({**out, "samples": samples}, text)


def _empty_latent(width: int, height: int, batch: int) -> Tensor:
    size = (batch, LATENT_CHANNELS, height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    return torch.zeros(size, device=management.intermediate_device())


def _sample(
    guider: DualCopyGuider,
    latent: dict,
    preset: str,
    seed: int,
    denoise: float,
    steps: int,
    sampler_name: str,
) -> tuple[Tensor, Tensor]:
    """(latents [B, 128, H / 16, W / 16], sigmas), through the host's own sampling."""
    samples = comfy.sample.fix_empty_latent_channels(
        guider.model_patcher, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    height, width = (side * TOKEN_PIXELS for side in samples.shape[-2:])
    for warning in check_size(width, height):
        logger.warning(warning)
    chosen = find_preset(preset)
    curve = sigmas(steps or chosen.steps, width, height, chosen.mu, chosen.std, denoise)
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
    return out.to(management.intermediate_device()), curve


def _report(
    guider: DualCopyGuider, guidance: Guidance, curve: Tensor, samples: Tensor, seconds: float
) -> str:
    plan = guidance.plan(curve.tolist())
    steps = len(plan)
    height, width = (side * TOKEN_PIXELS for side in samples.shape[-2:])
    lines = [f"{steps} steps at {width}x{height}, {seconds:.1f} s"]
    if guider.unconditional is None:
        lines.append("without guidance: no unconditional copy is connected; half the time")
        return "\n".join(lines)
    count = Counter(step.unconditional for step in plan)
    lines.append(f"passes: {steps} conditional, {count['run']} unconditional")
    saved = steps - count["run"]
    if saved:
        reasons = [f"{count[k]} {word}" for k, word in _SAVINGS.items() if count[k]]
        lines.append(f"saved {saved / (2 * steps):.0%} of the passes: {', '.join(reasons)}")
    return "\n".join(lines)


_SAVINGS = {"reuse": "reused", "skip": "skipped at guidance 1"}


def _inputs() -> list:
    preset, *more_guidance = guidance_inputs()
    preset.tooltip = (
        "quality: 48 steps, default: 20, turbo: 12, each with the reference's sigmas and guidance."
    )
    return [
        io.Model.Input("conditional", tooltip="The conditional copy."),
        io.Model.Input(
            "unconditional",
            optional=True,
            tooltip="The unconditional copy. Left out, the picture is made without guidance: half "
            "the time and memory, and clearly less faithful to the caption.",
        ),
        io.Conditioning.Input("positive", tooltip="The encoded caption; JSON captions work best."),
        preset,
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The same seed, files and settings give the same picture.",
        ),
        io.Int.Input(
            "width",
            default=1024,
            min=16,
            max=8192,
            step=16,
            optional=True,
            tooltip="Width in pixels, a multiple of 16; trained from 256 to 2048. Not used where "
            "a latent is connected.",
        ),
        io.Int.Input(
            "height",
            default=1024,
            min=16,
            max=8192,
            step=16,
            optional=True,
            tooltip="Height in pixels, a multiple of 16; trained from 256 to 2048. Not used where "
            "a latent is connected.",
        ),
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
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How much of a connected picture is made anew. 1 is all of it.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="Another number of steps; 0 takes the preset's.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSAMPLER_NAMES,
            default="euler",
            optional=True,
            advanced=True,
            tooltip="The reference uses euler.",
        ),
        *more_guidance,
    ]
