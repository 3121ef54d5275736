"""Calibrate Ideogram 4: what quantizing each linear would cost, measured while sampling."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..errors import OpError
from ..quant.calibration import Calibration
from ..quant.captions import calibration_captions
from ..quant.fragility import fragility_table
from ..sampling import check_size, on_grid
from .calibrating import calibrate, encode
from .latents import empty_latent
from .missing_copy import check_given
from .pairing import sides_of
from .sampling_inputs import (
    make_guidance,
    model_inputs,
    preset_input,
    schedule,
    size_inputs,
    steps_input,
)
from .schema import CATEGORY

logger = logging.getLogger(__name__)
CalibrationType = io.Custom("IDEOGRAM4_CALIBRATION")
SHOWN = 12
CAPTIONS = len(calibration_captions())


class Calibrate(io.ComfyNode):
    """Both copies and captions -> a calibration file in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantCalibrate",
            display_name="Calibrate Ideogram 4",
            category=CATEGORY,
            description=(
                "Samples captions with both copies, twice, and writes what the input of every "
                "linear looks like and what quantizing each alone would cost, step by step: the "
                "captions that come with the pack, or your own. Use the unquantized model."
            ),
            search_aliases=["calibration", "quantize", "smoothquant", "importance", "imatrix"],
            is_output_node=True,
            inputs=[
                *model_inputs()[:2],
                preset_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFF,
                    tooltip="The first seed; more pictures take the seeds after it. Torch's "
                    "generator on the CPU takes the low 32 bits of a seed.",
                ),
                io.Int.Input(
                    "pictures",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many seeds each caption is sampled with. Each takes the time of "
                    "two pictures.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="calibration/ideogram4",
                    tooltip="Name of the file in the output folder; it gets a number.",
                ),
                *size_inputs(optional=True),
                steps_input(),
                CalibrationType.Input(
                    "earlier",
                    optional=True,
                    tooltip="A calibration by another such node, to which this one is added.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for the captions that come with the pack.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="An encoded caption of your own instead of those.",
                ),
                io.Int.Input(
                    "captions",
                    default=CAPTIONS,
                    min=1,
                    max=CAPTIONS,
                    optional=True,
                    tooltip="How many of the captions that come with the pack are sampled: the "
                    "first few are as varied as all. Not used with positive.",
                ),
            ],
            outputs=[
                CalibrationType.Output(
                    id="calibration",
                    display_name="calibration",
                    tooltip="For Quantize Ideogram 4, or another Calibrate node, which adds its "
                    "captions.",
                ),
                io.String.Output(id="path", display_name="path", tooltip="The file."),
                io.String.Output(
                    id="report", display_name="report", tooltip="The most fragile linears."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        conditional,
        preset: str,
        seed: int,
        pictures: int,
        filename_prefix: str,
        width: int = 1024,
        height: int = 1024,
        unconditional=None,
        steps: int = 0,
        earlier: Calibration | None = None,
        clip=None,
        positive=None,
        captions: int = CAPTIONS,
    ) -> io.NodeOutput:
        guidance = make_guidance(preset)
        check_given(cls, conditional, unconditional, guidance)
        if clip is None and positive is None:
            raise OpError(
                "there is nothing to sample",
                found="neither clip nor positive connected",
                needed="one of the two",
                hint="Connect clip for the captions that come with the pack, or positive for one "
                "of your own.",
            )
        (width, height), rounded = on_grid(width, height)
        notes = check_size(width, height, sides_of(conditional))
        for note in (*([rounded] if rounded else ()), *notes):
            logger.warning(note)
        target = _target(filename_prefix)
        curve, _ = schedule(preset, width, height, steps, 1.0)
        latent = empty_latent(width, height)
        own = positive is not None
        positives = [positive] if own else encode(clip, calibration_captions(captions))
        total = 2 * len(positives) * pictures * (len(curve) - 1)
        progress = comfy.utils.ProgressBar(total)
        found = calibrate(
            conditional,
            unconditional,
            positives,
            guidance,
            curve,
            latent,
            range(seed, seed + pictures),
            callback=progress.update_absolute,
        )
        if earlier is not None:
            found = earlier.merge(found)
        found.save(target)
        painted = sum(run.prompts * len(run.seeds) for run in found.provenance)
        report = f"{target.name}: {len(found.layers)} linears, from {painted} pictures\n\n"
        report += fragility_table(found, count=SHOWN, short=True)
        return io.NodeOutput(found, str(target), report, ui=ui.PreviewText(report))


def _target(prefix: str) -> Path:
    """The next free name in the output folder, which the host keeps it in."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_.safetensors"
