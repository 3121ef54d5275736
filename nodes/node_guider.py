"""Dual-copy CFG, and the preset whose sigmas and guidance go with it."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..sampling import check_size, on_grid
from . import one_copy
from .guider import DualCopyGuider
from .missing_copy import check_given
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
                *model_inputs(),
                preset_input(),
                *guidance_inputs(),
            ],
            outputs=[
                io.Guider.Output(
                    id="guider",
                    display_name="guider",
                    tooltip="Connect it to SamplerCustomAdvanced.",
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        conditional,
        positive,
        unconditional=None,
        residency="auto",
        unconditional_from=one_copy.INPUT,
        **settings,
    ) -> io.NodeOutput:
        chosen = make_guidance(**settings)
        if unconditional_from == one_copy.INPUT:
            check_given(cls, conditional, unconditional, chosen)
        guider = DualCopyGuider(
            conditional, unconditional, positive, chosen, residency, unconditional_from
        )
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
                "The reference's schedule: quality (48 steps), default (20) or turbo (12), or one "
                "for models without guidance: instant (8), fast (20) or turbotime (4). "
                "The sigmas depend on the size of the picture."
            ),
            search_aliases=["scheduler", "sigmas", "steps", "quality", "turbo", "ideogram preset"],
            inputs=[
                preset_input(),
                *size_inputs(),
                steps_input(),
                denoise_input(),
                *unsettled_inputs(),
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
        cls,
        preset: str,
        width: int,
        height: int,
        steps: int = 0,
        denoise: float = 1.0,
        schedule_mu: str = PRESET_MU,
        last_sigma: str = ZERO,
    ) -> io.NodeOutput:
        (width, height), rounded = on_grid(width, height)
        for note in (*([rounded] if rounded else ()), *check_size(width, height)):
            logger.warning(note)
        return io.NodeOutput(
            *schedule(preset, width, height, steps, denoise, schedule_mu, last_sigma)
        )
