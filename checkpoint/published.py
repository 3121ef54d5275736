"""The files that others publish: what there is of each level, how large, and where.

Sizes are those on the files' pages, rounded as they are there. No checksum is known here: compare
what ``doctor --sha256`` prints with the file's page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SITE = "huggingface.co"


@dataclass(frozen=True)
class Published:
    """A file somebody publishes. level is None for the encoder and the VAE; sha256: if known.

    use: what an optional file is for.
    """

    name: str
    kind: str
    nbytes: int | None
    repository: str
    level: str | None = None
    sha256: str | None = None
    use: str | None = None

    @property
    def url(self) -> str:
        """The page to download it from."""
        return f"https://{_SITE}/{self.repository}"


PUBLISHED = (
    *(
        Published(f"{name}.safetensors", "diffusion_models", nbytes, "Comfy-Org/Ideogram-4", level)
        for name, nbytes, level in (
            ("ideogram4_int8_convrot", 9_580_000_000, "INT8 W8A8 rotated"),
            ("ideogram4_unconditional_int8_convrot", 9_580_000_000, "INT8 W8A8 rotated"),
            ("ideogram4_fp8_scaled", 9_280_000_000, "FP8"),
            ("ideogram4_unconditional_fp8_scaled", 9_280_000_000, "FP8"),
            ("ideogram4_nvfp4_mixed", 5_490_000_000, "NVFP4"),
            ("ideogram4_unconditional_nvfp4_mixed", 5_490_000_000, "NVFP4"),
        )
    ),
    *(
        Published(name, "diffusion_models", nbytes, f"transformerlab/{repository}", level)
        for name, nbytes, repository, level in (
            ("ideogram4-q8_0.gguf", 19_700_000_000, "ideogram-4-gguf-q8_0", "Q8_0"),
            ("ideogram4-q4_k.gguf", 10_440_000_000, "ideogram-4-gguf-q4_k", "Q4_K"),
        )
    ),
    Published(
        "qwen3vl_8b_fp8_scaled.safetensors",
        "text_encoders",
        10_600_000_000,
        "Comfy-Org/Qwen3-VL",
    ),
    Published(
        "qwen3vl_8b_nvfp4.safetensors",
        "text_encoders",
        6_300_000_000,
        "Comfy-Org/Qwen3-VL",
    ),
    Published(
        "diffusion_pytorch_model.safetensors",
        "text_encoders",
        None,
        "diffusers/qwen3-vl-8b-instruct-lm-head",
        use="a head, for encoders without one: Caption's expand writes with it; optional",
    ),
    Published("flux2-vae.safetensors", "vae", 336_000_000, "Comfy-Org/flux2-dev"),
)
# pages with files of one branch, whose names are not settled either
_ONE_BRANCH = ("fal/ideogram-v4-instant", "Hippotes/Ideogram4-Fal-ComfyUI")
# pages with files of a level whose names are not settled
_PAGES = {
    "Q4_0": ("leejet/ideogram-4-GGUF", "molbal/ideogram-4-gguf"),
    "SDNQ 4-bit": ("WaveCut/ideogram-4-sdnq-uint4",),
}


def most_wanted(kind: str) -> str:
    """The file of a folder that most people want, and its page: ``NAME, from PAGE``."""
    found = next(file for file in PUBLISHED if file.kind == kind and file.level in (None, "FP8"))
    return f"{found.name}, from {_SITE}/{found.repository}"


def files_of(level: str | None, *, one_branch: bool = False) -> str:
    """What to download for a level, for people; None: for any. one_branch: a distilled model."""
    if one_branch:
        said = "" if level is None else f" at {level}"
        return f"a distilled model{said}, such as Instant (from {_pages(_ONE_BRANCH)}),"
    if level is None:
        large, small = files_of("INT8 W8A8 rotated"), files_of("Q4_K")
        return f"{large} for a 24 GB card, or {small} for a smaller one,"
    files = [file for file in PUBLISHED if file.level == level]
    if files:
        names = " and ".join(file.name for file in files)
        return f"{names} (from {_pages({file.repository for file in files})})"
    if level in _PAGES:
        return f"both copies (from {_pages(_PAGES[level])})"
    made = level.startswith(("Q", "IQ", "INT8"))
    return f"files of {level}" + (" (the node Quantize Ideogram 4 makes them)" if made else "")


def other_copy(level: str) -> str:
    """The published file that has the unconditional copy of a level, and its page, for people."""
    files = [file for file in PUBLISHED if file.level == level]
    named = [file for file in files if "unconditional" in file.name] or files
    if named:
        held = "" if "unconditional" in named[0].name else ", which holds both copies"
        return f"{named[0].name} (from {_SITE}/{named[0].repository}{held})"
    if level in _PAGES:
        return f"the unconditional copy (from {_pages(_PAGES[level])})"
    made = level.startswith(("Q", "IQ", "INT8", "W"))
    way = " (the node Quantize Ideogram 4 makes it of an unconditional copy)" if made else ""
    return f"the unconditional copy at {level}{way}"


def _pages(repositories: Iterable[str]) -> str:
    return " or ".join(f"{_SITE}/{repository}" for repository in repositories)
