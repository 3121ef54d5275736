"""The pack as ComfyUI sees it: one extension, one explicit list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .node_calibrate import Calibrate
from .node_caption import CheckCaption
from .node_compare import CompareLevels
from .node_encoder import LoadEncoder
from .node_guider import DualCopyCFG, SamplingPreset
from .node_lora import LoadLora
from .node_model import LoadIdeogram4
from .node_quantize import Quantize
from .node_sampler import Sampler
from .node_vae import LoadVAE
from .node_write_caption import Caption
from .picture_notes import watch_queue

NODES: list[type[io.ComfyNode]] = [
    LoadIdeogram4,
    LoadEncoder,
    LoadVAE,
    LoadLora,
    Caption,
    CheckCaption,
    Sampler,
    DualCopyCFG,
    SamplingPreset,
    CompareLevels,
    Calibrate,
    Quantize,
]


class Ideogram4QuantExtension(ComfyExtension):
    """Ideogram 4.0 at 8 and 4 bits."""

    async def on_load(self) -> None:
        watch_queue()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
