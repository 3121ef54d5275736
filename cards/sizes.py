"""What the released model weighs at each level, and its text encoder: computed from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from ..checkpoint import ModelConfig
from ..checkpoint.canonical import canonical_shapes
from ..checkpoint.encoders import encoder_shapes
from ..ops.blocks import FORMATS

_BITS = {
    "FP8": 8.0,
    "INT8 blockwise": 8.0,
    "INT8 W8A8": 8.0,
    "INT8 W8A8 rotated": 8.0,
    "MXFP8": 8.25,
    "W6A8": 6.5,
    "SVDQuant W4A4": 8.5,  # held as Q8_0
    "SDNQ 8-bit": 8.5,
    "SDNQ 4-bit": 5.0,
    "W4A8": 4.5,
    "NVFP4": 4.5,
    "AWQ W4A16": 4.5,
    "NF4": 4.5,
    "INT4 W4A4": 4.0,
}
_QWEN3_VL_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}


@cache
def copy_bytes(level: str, itemsize: int = 2) -> int:
    """Bytes of one copy: block linears at the level, the rest, and all of BF16, in ``itemsize``."""
    return _nbytes(canonical_shapes(ModelConfig()), level, itemsize)


@cache
def encoder_bytes(level: str) -> int:
    """Bytes of the encoder's language model: linears at the level, its embedding in 16 bits."""
    return _nbytes(encoder_shapes(_QWEN3_VL_8B), level, 2)


@cache
def block_bytes(level: str, itemsize: int = 2) -> int:
    """Bytes of one transformer block of a copy, its norms and its modulation too."""
    shapes = canonical_shapes(ModelConfig())
    first = {name: shape for name, shape in shapes.items() if name.startswith("layers.0.")}
    return _nbytes(first, level, itemsize)


@cache
def encoder_weights() -> int:
    """Weights of the encoder's linears: what every text token is multiplied by."""
    shapes = encoder_shapes(_QWEN3_VL_8B)
    return sum(
        math.prod(s) for name, s in shapes.items() if name.startswith("layers.") and len(s) == 2
    )


def bits(level: str) -> float:
    """Bits of a weight at ``level``, its scales too. Raises KeyError for a level that has none."""
    return 16.0 if level == "BF16" else _bits(level)


def _nbytes(shapes: Mapping[str, tuple[int, ...]], level: str, itemsize: int) -> int:
    total = 0.0
    for name, shape in shapes.items():
        quantized = level != "BF16" and name.startswith("layers.") and len(shape) == 2
        total += math.prod(shape) * (_bits(level) / 8 if quantized else itemsize)
    return round(total)


def _bits(level: str) -> float:
    if level in _BITS:
        return _BITS[level]
    block = FORMATS[level]
    return 8 * block.type_size / block.block_size
