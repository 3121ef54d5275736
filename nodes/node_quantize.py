"""Quantize Ideogram 4: a file of another level into models/diffusion_models."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import comfy.utils
from comfy_api.latest import io

from ..checkpoint import open_checkpoint
from ..checkpoint.copies import COPIES
from ..checkpoint.listing import new_name, stamp
from ..checkpoint.published import most_wanted
from ..quant.block_types import check_policy
from ..quant.errors import QuantOptionError
from ..quant.quantize import SUFFIXES, quantize_checkpoint
from ..quant.recipes import RECIPES, QuantOptions, recipe_of
from ..quant.target import Request, Target, quantize_to_target
from .made_files import remember_file, times_lost
from .model_files import host_listing
from .node_calibrate import CalibrationType
from .schema import CATEGORY

FOLDERS = "diffusion_models"
NONE = "none"
AS_IN_FILE = "as in the file"


class Quantize(io.ComfyNode):
    """A model file and a level -> a new file beside it, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        listing = host_listing(FOLDERS)
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
                    options=listing.choices,
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
                    options=[AS_IN_FILE, *COPIES],
                    default=AS_IN_FILE,
                    tooltip="Which copy the file holds, where it does not say, or which of its two "
                    "to take.",
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="Name of the new file in models/diffusion_models; empty: named after "
                    "copy and level.",
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
                io.Combo.Input(
                    "policy",
                    options=["uniform"],
                    default="uniform",
                    optional=True,
                    advanced=True,
                    tooltip="Of older workflows, whose values would slip without it. For other "
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
                    tooltip="Size of the file in GB instead of a level: each linear is stored as "
                    "brings the picture nearest. Of the level only the format counts: GGUF, or "
                    "safetensors that ComfyUI's own nodes load too. 0: the level throughout.",
                ),
                io.Combo.Input(
                    "base_file",
                    options=[NONE, *listing.names],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="For sources that hold linear layers only: a complete file of the "
                    "same model.",
                ),
                io.Combo.Input(
                    "device",
                    options=["cpu", "gpu"],
                    default="cpu",
                    optional=True,
                    advanced=True,
                    tooltip="Where to encode. gpu: ComfyUI's own device.",
                ),
            ],
            outputs=[
                io.String.Output(id="path", display_name="path", tooltip="The new file."),
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
    ) -> bool | str:
        try:
            check_policy(policy or "uniform")
        except QuantOptionError as error:
            return str(error)
        listing = host_listing(FOLDERS)
        problem = listing.problem(source, most_wanted(FOLDERS))
        if problem is not True or base_file in (None, NONE):
            return problem
        return listing.problem(base_file)

    @classmethod
    def fingerprint_inputs(cls, source: str, base_file: str = NONE, **_) -> str:
        paths = host_listing(FOLDERS).paths
        read = [stamp(paths[name]) for name in (source, base_file) if name in paths]
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
    ) -> io.NodeOutput:
        check_policy(policy)
        listing = host_listing(FOLDERS)
        path = listing.path(source)
        base = None if base_file == NONE else listing.path(base_file)
        which = None if copy == AS_IN_FILE else copy
        recipe = recipe_of(level)
        suffix = SUFFIXES["gguf" if recipe.file_format == "gguf" else "native"]
        if not filename.strip():
            found = open_checkpoint(path, base, copy=which)
            name = "-".join(found.copies if which is None else (which,))
            name = name if found.one_branch is None else "one-branch"
            stored = f"{target_gb:g}GB" if target_gb > 0 else recipe.level.replace(" ", "_")
            filename = f"ideogram4-{name}-{stored}"
        out = Path(listing.folder) / new_name(filename, suffix)
        bar: comfy.utils.ProgressBar | None = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            management.throw_exception_if_processing_interrupted()
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        choice = {
            "copy": which,
            "base": base,
            "overwrite": overwrite,
            "device": management.get_torch_device() if device == "gpu" else "cpu",
            "resume": not overwrite,
        }
        if target_gb > 0:
            options = QuantOptions(calibration=calibration, native=suffix == SUFFIXES["native"])
            target = Target(int(target_gb * 1e9), f"{target_gb:g} GB")
            chosen, reports = quantize_to_target(
                Request(path, out, target, options=options, **choice),
                lambda what, done, total: progress(done, total),
            )
            report = "\n\n".join([chosen.table(), *(each.table() for each in reports)])
        else:
            options = QuantOptions(calibration=calibration)
            report = quantize_checkpoint(
                path, level, out, options=options, progress=progress, keep_partial=True, **choice
            ).table()
        remember_file(str(cls.hidden.unique_id), out)
        return io.NodeOutput(str(out), f"{report}\n\nPress R to see it in the loaders.")
