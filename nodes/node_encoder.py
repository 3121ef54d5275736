"""Load Qwen3-VL encoder (quantized)."""

from __future__ import annotations

from comfy_api.latest import io

from ..checkpoint.published import most_wanted
from .encoder_loading import load_encoder
from .file_choices import choices
from .model_files import host_stamp, known_listing
from .schema import CATEGORY

FOLDERS = "text_encoders"


class LoadEncoder(io.ComfyNode):
    """An encoder file -> CLIP for the host's text nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantLoadEncoder",
            display_name="Load Qwen3-VL encoder (quantized)",
            category=CATEGORY,
            description=(
                "Loads the text encoder of Ideogram 4 from models/text_encoders: bf16, FP8, INT8 "
                "or GGUF. A head and vision weights in the file are read when Caption writes."
            ),
            search_aliases=[
                "qwen3vl",
                "clip loader gguf",
                "load clip",
                "text encoder",
                "ideogram encoder",
            ],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=choices(FOLDERS),
                    tooltip="A Qwen3-VL-8B file in models/text_encoders: .safetensors or .gguf.",
                )
            ],
            outputs=[
                io.Clip.Output(
                    id="clip",
                    display_name="clip",
                    tooltip="Connect it to Caption (Ideogram 4) or CLIP Text Encode.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool | str:
        return known_listing(FOLDERS).problem(encoder, most_wanted(FOLDERS))

    @classmethod
    def fingerprint_inputs(cls, encoder: str) -> str:
        return host_stamp(FOLDERS, encoder)

    @classmethod
    def execute(cls, encoder: str) -> io.NodeOutput:
        return io.NodeOutput(load_encoder(known_listing(FOLDERS).path(encoder)))
