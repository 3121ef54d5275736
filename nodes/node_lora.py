"""Load LoRA for Ideogram 4."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..checkpoint.copies import COPIES, UNCONDITIONAL
from ..checkpoint.loras import describe, parse_lora, read_lora, read_strength
from .file_choices import fitting_first
from .lora_baking import bake
from .lora_loading import add_lora, linear_shapes, other_shapes, remaining_folding
from .model_files import host_listing, host_stamp
from .schema import CATEGORY
from .unconditional_lora import marked

logger = logging.getLogger(__name__)
FOLDERS = "loras"
NONE = "none"
_NOTHING_PICKED = (
    "No LoRA is picked, so the models are as they were. Put one into models/loras, press R, and "
    "pick it here."
)
APPLY_TO = ("as in the file", *COPIES, "both")


class LoadLora(io.ComfyNode):
    """A LoRA beside the weights of either or both copies, at any quantization level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantLoadLora",
            display_name="Load LoRA for Ideogram 4",
            category=CATEGORY,
            description=(
                "Applies a LoRA beside the quantized weights: nothing is quantized again, and "
                "taking it out leaves no trace. Reads the names of every trainer, to_q, to_k and "
                "to_v included. DoRA, OFT, diffs and large LoKr and LoHa are baked into the "
                "weights instead, as the report says. Chain the node for more than one LoRA."
            ),
            search_aliases=["lora", "lora loader", "lora int8", "lora gguf", "turbotime"],
            inputs=[
                io.Model.Input("conditional", tooltip="The conditional copy."),
                io.Model.Input(
                    "unconditional", optional=True, tooltip="The unconditional copy, if you use it."
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *fitting_first(FOLDERS)],
                    default=NONE,
                    tooltip="A LoRA in models/loras, trained for Ideogram 4. none: the models as "
                    "they are.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly the LoRA acts; 1 as trained, 0 not at all.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default=APPLY_TO[0],
                    optional=True,
                    advanced=True,
                    tooltip="Which copy the LoRA acts on. Most files do not say and were trained "
                    "on the conditional copy; those that say are obeyed. For an unconditional "
                    "LoRA connect the conditional copy to both inputs, and pick unconditional.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    id="conditional_out",
                    display_name="conditional",
                    tooltip="The conditional copy with the LoRA.",
                ),
                io.Model.Output(
                    id="unconditional_out",
                    display_name="unconditional",
                    tooltip="The unconditional copy, with the LoRA where it acts on it.",
                ),
                io.String.Output(
                    id="report", display_name="report", tooltip="What was found in the file."
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        return lora == NONE or host_listing(FOLDERS).problem(lora)

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_) -> str:
        return host_stamp(FOLDERS, lora)

    @classmethod
    def execute(
        cls, conditional, lora: str, strength: float, unconditional=None, apply_to=APPLY_TO[0]
    ) -> io.NodeOutput:
        if lora == NONE:
            told = _NOTHING_PICKED
            return io.NodeOutput(conditional, unconditional, told, ui=ui.PreviewText(told))
        path = host_listing(FOLDERS).path(lora)
        found = parse_lora(
            read_lora(path),
            linear_shapes(conditional),
            lora,
            read_strength(path),
            other_shapes(conditional),
        )
        if found.unknown:
            logger.warning("%s: %s", lora, describe(found).splitlines()[-1])
        outputs, notes = [], [describe(found, apply_to)]
        for copy, model in zip(COPIES, (conditional, unconditional), strict=True):
            updates = found.for_copy(copy, apply_to)
            if model is None:
                outputs.append(None)
                continue
            patched = bake(model, found.changes_for_copy(copy, apply_to), strength)
            patched = add_lora(patched, updates, strength)
            if copy == UNCONDITIONAL:
                how = f"{lora} at {strength:g}"
                patched = marked(patched, conditional, found, apply_to, how)
            outputs.append(patched)
            if updates and remaining_folding(model) is not None:
                notes.append(f"{copy}: mapped to the folded weights that a stock loader has loaded")
        told = "\n".join(notes)
        return io.NodeOutput(*outputs, told, ui=ui.PreviewText(told))
