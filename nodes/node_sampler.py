"""Ideogram 4 Sampler: noise, schedule, guidance and sampling in one."""

from __future__ import annotations

import logging

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor

from ..errors import OpError
from ..sampling import check_size, on_grid
from . import one_copy
from .connections import is_read
from .guider import DualCopyGuider
from .latents import TOKEN_PIXELS, check_latent, empty_latent
from .missing_copy import check_given
from .pairing import sides_of
from .sampling_inputs import (
    BY_HAND,
    PRESET_MU,
    ZERO,
    asked_size,
    denoise_input,
    guidance_inputs,
    make_guidance,
    model_inputs,
    preset_input,
    ratio_inputs,
    schedule,
    size_inputs,
    steps_input,
    unsettled_inputs,
)
from .sampling_report import Clock, PeakMemory, report
from .schema import CATEGORY, details_input

logger = logging.getLogger(__name__)
_IMAGE = 2  # the output's place
_NO_VAE = "Connect a VAE to vae of the sampler, or take its output latent to VAE Decode."


class Sampler(io.ComfyNode):
    """Both copies and a caption -> LATENT, and the picture where a VAE is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantSampler",
            display_name="Ideogram 4 Sampler",
            category=CATEGORY,
            description=(
                "Samples with the reference's schedule and guidance, all in one node. Connect a "
                "latent for image to image or inpainting; else the size is an aspect ratio, or "
                "width and height by hand. With a VAE connected it gives the picture too."
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
                    tooltip="Size, steps, seconds a step, seed, guidance, passes of each copy made "
                    "and skipped, peak memory.",
                ),
                io.Image.Output(
                    id="image",
                    display_name="image",
                    tooltip="The picture. Needs vae; without it take latent to VAE Decode.",
                ),
                io.Int.Output(
                    id="seed_out",
                    display_name="seed",
                    tooltip="The seed, for another sampler that shall start from the same noise.",
                ),
            ],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
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
        aspect_ratio: str = BY_HAND,
        megapixels: float = 1.0,
        details: bool = False,
        vae=None,
        **guidance,
    ) -> io.NodeOutput:
        hidden = cls.hidden  # None where no host runs it
        if vae is None and hidden and is_read(hidden.prompt, hidden.unique_id, _IMAGE):
            raise OpError("there is no VAE for the output image", hint=_NO_VAE)
        chosen = make_guidance(preset, **guidance)
        if unconditional_from == one_copy.INPUT:
            check_given(cls, conditional, unconditional, chosen)
        notes = []
        if latent is None:
            (width, height), rounded = on_grid(*asked_size(aspect_ratio, megapixels, width, height))
            notes += [rounded] if rounded else []
            latent = {"samples": empty_latent(width, height, batch_size)}
        guider = DualCopyGuider(
            conditional, unconditional, positive, chosen, residency, unconditional_from
        )
        clock, memory = Clock(), PeakMemory(conditional.load_device)
        samples = comfy.sample.fix_empty_latent_channels(
            guider.model_patcher, latent["samples"], latent.get("downscale_ratio_spacial")
        )
        check_latent(samples)
        height, width = (side * TOKEN_PIXELS for side in samples.shape[-2:])
        notes += check_size(width, height, sides_of(conditional))
        for note in notes:
            logger.warning(note)
        curve = sigmas
        if curve is None:
            curve, _ = schedule(preset, width, height, steps, denoise, schedule_mu, last_sigma)
        latent = {**latent, "samples": samples}
        samples = _sample(guider, latent, curve, seed, sampler_name, clock)
        clock.stop()
        size = f"{width}x{height}, preset {preset}"
        text = report(guider, curve, seed, clock, memory, size, notes, details=details)
        out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
        picture = ExecutionBlocker(_NO_VAE) if vae is None else vae.decode(samples)
        return io.NodeOutput(
            {**out, "samples": samples}, text, picture, seed, ui=ui.PreviewText(text)
        )


def _sample(
    guider: DualCopyGuider, latent: dict, curve: Tensor, seed: int, sampler_name: str, clock: Clock
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
        callback=clock.watching(
            latent_preview.prepare_callback(guider.model_patcher, len(curve) - 1)
        ),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return out.to(management.intermediate_device())


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
        *ratio_inputs(),
        details_input(),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Decodes the picture here, for the output image: no VAE Decode is needed.",
        ),
    ]
