"""What a copy of the released model weighs at each level."""

from __future__ import annotations

from functools import cache

from ...checkpoint import ModelConfig
from ...checkpoint.canonical import canonical_shapes
from ...ops.blocks import FORMATS

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
