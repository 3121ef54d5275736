"""The published files, and what a copy of the model weighs at each level.

Sizes are those on the files' pages, rounded as they are there. No checksum is known here: compare
what ``doctor --sha256`` prints with the file's page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..checkpoint import ModelConfig
from ..checkpoint.canonical import canonical_shapes
from ..ops.blocks import FORMATS

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Expected:
    """A file somebody publishes. level is None for the encoder and the VAE; sha256: if known."""

    name: str
    kind: str
    nbytes: int | None
    repository: str
    level: str | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        """The page to download it from."""
        return _HUB + self.repository


EXPECTED = (
    *(
        Expected(f"{name}.safetensors", "diffusion_models", nbytes, "Comfy-Org/Ideogram-4", level)
        for name, nbytes, level in (
            ("ideogram4_int8_convrot", 9_580_000_000, "INT8 W8A8 rotated"),
            ("ideogram4_unconditional_int8_convrot", 9_580_000_000, "INT8 W8A8 rotated"),
            ("ideogram4_fp8_scaled", 9_280_000_000, "FP8"),
            ("ideogram4_unconditional_fp8_scaled", 9_280_000_000, "FP8"),
        )
    ),
    *(
        Expected(name, "diffusion_models", nbytes, f"transformerlab/{repository}", level)
        for name, nbytes, repository, level in (
            ("ideogram4-q8_0.gguf", 19_700_000_000, "ideogram-4-gguf-q8_0", "Q8_0"),
            ("ideogram4-q4_k.gguf", 10_440_000_000, "ideogram-4-gguf-q4_k", "Q4_K"),
        )
    ),
    Expected(
        "qwen3vl_8b_fp8_scaled.safetensors",
        "text_encoders",
        10_600_000_000,
        "Comfy-Org/Qwen3-VL",
    ),
    Expected("flux2-vae.safetensors", "vae", 336_000_000, "Comfy-Org/flux2-dev"),
)
_BITS = {"BF16": 16.0, "FP8": 8.0, "INT8 W8A8": 8.0, "INT8 W8A8 rotated": 8.0, "NF4": 4.5}


@cache
def copy_bytes(level: str) -> int:
    """Bytes of one copy of the released model: block linears at the level, the rest in 16 bits."""
    if level in _BITS:
        bits = _BITS[level]
    else:
        block = FORMATS[level]
        bits = 8 * block.type_size / block.block_size
    total = 0.0
    for name, shape in canonical_shapes(ModelConfig()).items():
        size = 1
        for side in shape:
            size *= side
        linear = name.startswith("layers.") and len(shape) == 2
        total += size * (bits if linear else 16) / 8
    return round(total)
