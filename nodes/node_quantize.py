"""Quantize Ideogram 4: a file of another level into models/diffusion_models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.model_management as management
from comfy_api.latest import io, ui

from ..checkpoint.copies import COPIES
from ..checkpoint.listing import stamp
from ..checkpoint.published import most_wanted
from ..quant.block_types import check_policy
from ..quant.errors import QuantOptionError
from ..quant.presets import AS_PICKED, PRESETS, preset_of
from ..quant.recipes import RECIPES, QuantOptions, recipe_of
from .file_choices import choices, fitting_first
from .made_files import remember_files, times_lost
from .model_files import host_listing
from .node_calibrate import CalibrationType
from .quantize_jobs import AS_IN_FILE, BOTH, NONE, at_level, at_size, parts_of, size_of
from .schema import CATEGORY, combo_input
from .switches import in_words_of_the_node

FOLDERS = "diffusion_models"


class Quantize(io.ComfyNode):
    """A model file and a level -> a new file beside it, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = fitting_first(FOLDERS)
        return io.Schema(
            node_id="Ideogram4QuantQuantize",
            display_name="Quantize Ideogram 4",
            category=CATEGORY,
            description=(
                "Writes one copy of Ideogram 4, your own fine-tune for example, at another level "
                "into models/diffusion_models: INT8 that stock ComfyUI loads too, or GGUF. Layer "
                "by layer, in little memory. Takes minutes to an hour; an interrupted run goes on "
                "where it was. ideogram4-quant quantize does the same on a command line."
            ),
            search_aliases=["quantize", "convert", "gguf", "int8", "q4_k", "save model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source",
                    options=names or choices(FOLDERS),
                    tooltip="The file to quantize: BF16 or FP8. Each copy is quantized by itself.",
                ),
                io.Combo.Input(
                    "level",
                    options=list(RECIPES),
                    default="INT8 W8A8 rotated",
                    tooltip="INT8 W8A8 rotated for the RTX 20 series on; Q4_K for small memory.",
                ),
                io.Combo.Input(
                    "copy",
                    options=[AS_IN_FILE, *COPIES, BOTH],
                    default=AS_IN_FILE,
                    tooltip="Which copy the file holds, where it does not say, or which of its two "
                    "to take. both: the two of one file, each to a file of its own.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Name of the new file in models/diffusion_models; empty: my-tune-Q4_K "
                    "for my-tune. With pair the other file is called the same with its copy behind "
                    "it.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a file of that name. Otherwise it is left alone.",
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Calibrate Ideogram 4, on this very file: weights are then "
                    "rounded, and GGUF scales searched, for the least error of the outputs.",
                ),
                combo_input(
                    "policy",
                    ["uniform"],
                    "Of older workflows, whose values would slip without it. For other "
                    "types in one file use target_gb.",
                ),
                io.Float.Input(
                    "target_gb",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Size of all that is written in GB instead of a level: each linear is "
                    "stored as brings the picture nearest. Of the level only the format counts: "
                    "GGUF, or safetensors that ComfyUI's own nodes load too. With pair or both, "
                    "the two copies are weighed against each other. 0: the level throughout.",
                ),
                combo_input(
                    "base_file",
                    [NONE, *names],
                    "For sources that hold linear layers only: a complete file of the same model.",
                ),
                combo_input(
                    "device",
                    ["cpu", "gpu"],
                    "Where to encode. gpu: ComfyUI's own device.",
                ),
                combo_input(
                    "pair",
                    [NONE, *names],
                    "The file of the other copy, to be written in the same run: under a "
                    "name of its own, at the same level. A calibration holds for both.",
                    advanced=False,
                ),
                combo_input(
                    "preset",
                    [AS_PICKED, *PRESETS],
                    "A recipe with all that belongs to it; it goes before the level and "
                    "needs a calibration. "
                    + " ".join(f"{name}: {preset.meaning}." for name, preset in PRESETS.items()),
                    advanced=False,
                ),
            ],
            outputs=[
                io.String.Output(
                    id="path", display_name="path", tooltip="The new file; of two, one a line."
                ),
                io.String.Output(
                    id="report",
                    display_name="report",
                    tooltip="Types, sizes and the layers that lost most. Press R to see the file "
                    "in the loaders.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        source: str | None = None,
        base_file: str | None = None,
        policy: str | None = None,
        pair: str | None = None,
    ) -> bool | str:
        try:
            check_policy(policy or "uniform")
        except QuantOptionError as error:
            return str(error)
        listing = host_listing(FOLDERS)
        problems = [listing.problem(source, most_wanted(FOLDERS))]
        problems += [
            listing.problem(name) for name in (base_file, pair) if name not in (None, NONE)
        ]
        return next((problem for problem in problems if problem is not True), True)

    @classmethod
    def fingerprint_inputs(
        cls, source: str, base_file: str = NONE, pair: str = NONE, **_: object
    ) -> str:
        paths = host_listing(FOLDERS).paths
        read = [stamp(paths[name]) for name in (source, base_file, pair) if name in paths]
        return repr((read, times_lost(str(cls.hidden.unique_id))))

    @classmethod
    def execute(
        cls,
        source: str,
        level: str,
        copy: str,
        filename: str,
        overwrite: bool,
        calibration=None,
        policy: str = "uniform",
        target_gb: float = 0.0,
        base_file: str = NONE,
        device: str = "cpu",
        pair: str = NONE,
        preset: str = AS_PICKED,
    ) -> io.NodeOutput:
        with in_words_of_the_node(_INPUTS):
            check_policy(policy)
            listing = host_listing(FOLDERS)
            base = None if base_file == NONE else listing.path(base_file)
            size = size_of(target_gb, preset)
            more: Mapping[str, object] = {}
            if preset != AS_PICKED:
                chosen = preset_of(preset, calibration is not None)
                level, more = chosen.level, chosen.options
            options = QuantOptions(calibration=calibration, **more)
            parts = parts_of(listing, source, recipe_of(level), size, copy, filename, pair)
            choice = {
                "base": base,
                "overwrite": overwrite,
                "device": management.get_torch_device() if device == "gpu" else "cpu",
                "resume": not overwrite,
            }
            if size is None:
                reports = at_level(level, parts, options, choice)
            else:
                reports = at_size(size, parts, options, choice)
        remember_files(str(cls.hidden.unique_id), [Path(part.out) for part in parts])
        told = [*reports, "Press R to see it in the loaders."]
        report = "\n\n".join(told)
        files = "\n".join(str(part.out) for part in parts)
        return io.NodeOutput(files, report, ui=ui.PreviewText(report))


_INPUTS = ("overwrite", "copy", "calibration", "target_gb", "device")
