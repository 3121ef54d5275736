"""A copy of a small model at any level: the levels that are read only, too."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from ideogram4_quant.quant import RECIPES, quantize_checkpoint
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_storage as storage

PACKERS = {"FP8": storage.pack_fp8, "NF4": storage.pack_nf4}
ALL_LEVELS = ("BF16", *PACKERS, *RECIPES)


def write_level(source: Path, level: str, folder: Path, copy: str) -> Path:
    """The file of that level, below `folder`; for BF16 the source itself."""
    if level == "BF16":
        return source
    stem = folder / f"{level.replace(' ', '_')}_{copy}"
    if level in RECIPES:
        out = stem.with_suffix(f".{RECIPES[level].file_format}")
        quantize_checkpoint(source, level, out, copy=copy)
        return out
    stored = {}
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            tensor = opened.get_tensor(name)
            if not (name.startswith("layers.") and tensor.ndim == 2):
                stored[name] = tensor
                continue
            parts, _ = PACKERS[level](tensor.float())
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
    return files.save(stem.with_suffix(".safetensors"), stored, metadata)
