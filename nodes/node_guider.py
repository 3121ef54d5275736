"""Dual-copy CFG, and the preset whose sigmas and guidance go with it."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..sampling import PRESETS, check_size, guidance_schedule, sigmas
from ..sampling import preset as find_preset
from . import residency
from .guidance import Guidance, format_guidance, parse_guidance
from .guider import DualCopyGuider
from .schema import CATEGORY

logger = logging.getLogger(__name__)


def guidance_inputs() -> list:
    """The inputs that decide guidance and residency, shared by the guider and the sampler."""
    return [
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="default",
            tooltip="The reference's guidance: 7, and 3 for the last steps (quality: three of "
            "them, default: two, turbo: one).",
        ),
        io.String.Input(
            "guidance",
            default="",
            placeholder="the preset's",
            optional=True,
            tooltip="Your own guidance instead of the preset's: one number for every step, or a "
            "list in the order of the steps, such as 7*18, 3*2. 1 means without guidance, and "
            "skips the unconditional copy. Empty: the preset's.",
        ),
        io.Float.Input(
            "guidance_start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The part of the steps after which guidance begins. Steps without guidance "
            "take half the time, and the picture changes. 0: from the first step.",
        ),
        io.Float.Input(
            "guidance_end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="The part of the steps after which guidance ends. 1: it never does.",
        ),
        io.Int.Input(
            "reuse_unconditional",
            default=1,
            min=1,
            max=8,
            optional=True,
            advanced=True,
            tooltip="Use each unconditional prediction for so many steps. 2 saves a quarter of "
            "the time, and the picture changes. 1: off, as in the reference.",
        ),
        io.Combo.Input(
            "residency",
            options=list(residency.CHOICES),
            default=residency.AUTO,
            optional=True,
            advanced=True,
            tooltip="Which copies stay on the device. both: both at once. alternating: one at a "
            "time, in turns, for cards that hold only one. auto: by the memory there is. The "
            "picture is the same.",
        ),
    ]


def make_guidance(
    preset: str,
    guidance: str = "",
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    reuse_unconditional: int = 1,
) -> Guidance:
    """The guidance that those inputs describe."""
    own = guidance.strip()
    return Guidance(
        preset=None if own else preset,
        values=parse_guidance(own) if own else (),
        interval=(guidance_start, guidance_end),
        reuse=reuse_unconditional,
    )


class DualCopyCFG(io.ComfyNode):
    """Both copies and a caption -> GUIDER for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantGuider",
            display_name="Dual-copy CFG (Ideogram 4)",
            category=CATEGORY,
            description=(
                "Guidance as the reference does it: the unconditional copy sees the picture "
                "alone, and the strength follows the step. There is no negative prompt."
            ),
            search_aliases=["cfg guider", "dual model guider", "ideogram guider", "guidance"],
            inputs=[
                io.Model.Input("conditional", tooltip="The conditional copy."),
                io.Model.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The unconditional copy. Left out, the picture is made without "
                    "guidance: half the time and memory, and clearly less faithful to the caption.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The encoded caption; JSON captions work best."
                ),
                *guidance_inputs(),
            ],
            outputs=[
                io.Guider.Output(
                    id="guider",
                    display_name="guider",
                    tooltip="Connect it to SamplerCustomAdvanced.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, conditional, positive, unconditional=None, residency="auto", **settings
    ) -> io.NodeOutput:
        chosen = make_guidance(**settings)
        guider = DualCopyGuider(conditional, unconditional, positive, chosen, residency)
        return io.NodeOutput(guider)


class SamplingPreset(io.ComfyNode):
    """A preset and a size -> the reference's sigmas, and the guidance that goes with them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantPreset",
            display_name="Ideogram 4 preset",
            category=CATEGORY,
            description=(
                "The reference's schedule: quality (48 steps), default (20) or turbo (12). "
                "The sigmas depend on the size of the picture."
            ),
            search_aliases=["scheduler", "sigmas", "steps", "quality", "turbo", "ideogram preset"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="default",
                    tooltip="quality: 48 steps. default: 20. turbo: 12.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width in pixels, a multiple of 16; trained from 256 to 2048.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height in pixels, a multiple of 16; trained from 256 to 2048.",
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
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="For image to image: how much of the picture is made anew. 1 is all.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    id="sigmas", display_name="sigmas", tooltip="For SamplerCustomAdvanced."
                ),
                io.String.Output(
                    id="guidance",
                    display_name="guidance",
                    tooltip="The guidance of every step, for the guidance input of the guider.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, preset: str, width: int, height: int, steps: int = 0, denoise: float = 1.0
    ) -> io.NodeOutput:
        for warning in check_size(width, height):
            logger.warning(warning)
        return io.NodeOutput(*schedule(preset, width, height, steps, denoise))


def schedule(name: str, width: int, height: int, steps: int, denoise: float):
    """(sigmas [steps + 1], guidance as text) of a preset; 0 steps means the preset's own."""
    chosen = find_preset(name)
    count = steps or chosen.steps
    curve = sigmas(count, width, height, chosen.mu, chosen.std, denoise)
    return curve, format_guidance(guidance_schedule(chosen, count))
