"""Where the pocket model's files lie, relative to this package."""

from pathlib import Path
from typing import Literal

Copy = Literal["cond", "uncond", "one_branch"]

WEIGHTS = Path(__file__).resolve().parent / "weights"
_DIT_FILES = {
    "cond": "ideogram4_pocket_bf16.safetensors",
    "uncond": "ideogram4_pocket_unconditional_bf16.safetensors",
    "one_branch": "ideogram4_pocket_instant_bf16.safetensors",
}


def dit_path(copy: Copy, root: Path = WEIGHTS) -> Path:
    """The bf16 file of one copy, or of the one branch, canonical (fused) names."""
    return root / "diffusion_models" / _DIT_FILES[copy]


def encoder_dir(root: Path = WEIGHTS) -> Path:
    """The text encoder's folder as Hugging Face ships it, tokenizer included."""
    return root / "text_encoders" / "qwen3vl_pocket"


def vae_dir(root: Path = WEIGHTS) -> Path:
    """The VAE's folder in diffusers' layout (`bn` in the order (pi, pj, c))."""
    return root / "vae" / "flux2_pocket"


def vae_file(root: Path = WEIGHTS) -> Path:
    """Where `comfy_vae.write_comfy_vae` puts the same VAE for ComfyUI; not committed."""
    return root / "vae" / "flux2-vae-pocket.safetensors"
