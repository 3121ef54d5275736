"""A copy of a small model at any level: the levels that are read only, too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from safetensors import safe_open

from ideogram4_quant.quant import RECIPES, quantize_checkpoint
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import fixtures_sdnq as sdnq_files
from ideogram4_quant.tests import fixtures_storage as storage

PACKERS = {
    "FP8": storage.pack_fp8,
    "NF4": storage.pack_nf4,
    "AWQ W4A16": storage.pack_awq,
    "SVDQuant W4A4": storage.pack_svdquant,
    **{level: partial(storage.pack_stock, level=level) for level in storage.STOCK},
    **{level: partial(sdnq_files.pack, dtype=dtype) for level, dtype in sdnq_files.LEVELS.items()},
}
READ_ONLY_BLOCKS = ("MXFP4",)  # by gguf-py
ALL_LEVELS = tuple(dict.fromkeys(("BF16", *PACKERS, *RECIPES, *READ_ONLY_BLOCKS)))


def write_level(source: Path, level: str, folder: Path, copy: str) -> Path:
    """The file of that level, or SDNQ's folder, below `folder`; for BF16 the source itself."""
    if level == "BF16":
        return source
    stem = folder / f"{level.replace(' ', '_')}_{copy}"
    if level in RECIPES:
        out = stem.with_suffix(f".{RECIPES[level].file_format}")
        quantize_checkpoint(source, level, out, copy=copy)
        return out
    if level in READ_ONLY_BLOCKS:
        return _write_blocks(source, level, stem.with_suffix(".gguf"), copy)
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
    if level in sdnq_files.LEVELS:
        return sdnq_files.save(stem, stored, sdnq_files.config(sdnq_files.LEVELS[level]), metadata)
    return files.save(stem.with_suffix(".safetensors"), stored, metadata)


def _write_blocks(source: Path, level: str, out: Path, copy: str) -> Path:
    tensors = {}
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            tensor = opened.get_tensor(name).float().numpy()
            linear = name.startswith("layers.") and tensor.ndim == 2
            tensors[name] = (tensor, level if linear else "F32")
    config = {"ideogram4.config": metadata["config"], "ideogram4.copy": copy}
    return files.write_gguf_py(out, tensors, config)
