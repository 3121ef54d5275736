"""What a quantized file is called: as its source, with the new level in the place of the old."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .recipes import RECIPES, Recipe

# what tools put at the end of a file's name for the precision that it has
_OLD = (
    r"bf16|b16|fp16|f16|fp32|f32|fp8|fp8_(?:scaled|mixed|e4m3fn|e5m2)|nf4|nvfp4|mxfp8|mxfp4|int8"
    r"|int8_convrot|int8_w8a8|full|(?:fit)?\d+(?:\.\d+)?gb|in\d+(?:\.\d+)?s"
)
_SHARDS = re.compile(r"[-_]\d{5}-of-\d{5}$")


def suffix_of(recipe: Recipe) -> str:
    """The ending of a level's files."""
    return ".gguf" if recipe.file_format == "gguf" else ".safetensors"


def output_name(source: str | os.PathLike[str], recipe: Recipe, copy: str | None = None) -> str:
    """``my-tune-v2-Q4_K.gguf`` for ``my-tune-v2.safetensors``, or for a folder of that name.

    copy: said too, unless the name does; for a source of which only one copy is taken.
    """
    return named_after(source, recipe.level.replace(" ", "_"), suffix_of(recipe), copy)


def named_after(
    source: str | os.PathLike[str], said: str, suffix: str, copy: str | None = None
) -> str:
    """``output_name`` with ``said`` for the level: ``my-tune-v2-10.4GB.safetensors`` of a size."""
    name = Path(source).name
    stem = re.sub(r"\.(safetensors|sft|gguf)$", "", name, flags=re.IGNORECASE)
    stem = _SHARDS.sub("", stem)
    stem = _without_level(stem)
    if copy is not None and not re.search(rf"(?:^|[-_. ]){copy}(?:$|[-_. ])", stem, re.IGNORECASE):
        stem = f"{stem}-{copy}"
    return f"{stem}-{said}{suffix}"


def _without_level(stem: str) -> str:
    levels = "|".join(re.escape(level.replace(" ", "_")) for level in RECIPES)
    return re.sub(rf"(?<=.)[-_. ](?:{_OLD}|{levels})$", "", stem, flags=re.IGNORECASE)
