"""Load FLUX.2 VAE (any width)."""

from __future__ import annotations

from comfy_api.latest import io

from ..checkpoint.published import most_wanted
from .file_choices import choices
from .model_files import host_stamp, known_listing
from .schema import CATEGORY
from .vae_loading import load_vae

FOLDERS = "vae"


class LoadVAE(io.ComfyNode):
    """A FLUX.2 VAE file -> VAE, also a narrower one than the host's own loader takes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Ideogram4QuantLoadVAE",
            display_name="Load FLUX.2 VAE (any width)",
            category=CATEGORY,
            description=(
                "Loads the VAE of Ideogram 4 from models/vae. For flux2-vae.safetensors the Load "
                "VAE node does the same; this one also takes the pocket model's narrow VAE."
            ),
            search_aliases=["vae loader", "flux2 vae", "ideogram vae"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=choices(FOLDERS),
                    tooltip="flux2-vae.safetensors, or the pocket model's VAE.",
                )
            ],
            outputs=[
                io.Vae.Output(
                    id="vae_out",
                    display_name="vae",
                    tooltip="Connect it to VAE Decode, or to VAE Encode for image to image.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, vae: str | None = None) -> bool | str:
        return known_listing(FOLDERS).problem(vae, most_wanted(FOLDERS))

    @classmethod
    def fingerprint_inputs(cls, vae: str) -> str:
        return host_stamp(FOLDERS, vae)

    @classmethod
    def execute(cls, vae: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(known_listing(FOLDERS).path(vae)))
