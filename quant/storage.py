"""The ways in which one linear of a mixed file may be stored, by name, and what each costs."""

from __future__ import annotations

import torch

from ..ops.blocks import FORMATS
from .choose import Choice
from .encodings import Blocks, Encoding, NativeInt8, Shape, Unquantized
from .int4_encoding import MULTIPLE as INT4_MULTIPLE
from .int4_encoding import ConvrotInt4
from .packed_encoding import PackedInt8
from .treatments import ROTATION, rotation_group

UNQUANTIZED = "BF16"
INT8, INT4 = "INT8", "W4A4"
PACKED_MULTIPLE = 32
"""Columns that a row of 6-bit codes is a multiple of, so that its two planes are aligned."""

_PACKED = {"W4A8 g32": (4, 32), "W4A8 g16": (4, 16), "W6A8 g32": (6, 32), "W6A8 g16": (6, 16)}
"""Name -> bits of a code, columns that share a scale."""

STORAGES: dict[str, tuple[str, ...]] = {
    "native": (INT4, *_PACKED, INT8, UNQUANTIZED),
    "gguf": ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0", UNQUANTIZED),
}
"""Container -> what a file of it may hold. ComfyUI's own loader reads all of ``native`` but INT8
with a smoothing vector, and runs it on the INT8 units, or the INT4 ones."""

INPUT_LIMITS = {**dict.fromkeys((*_PACKED, INT8), 127), INT4: 7}
"""Storage whose inputs are rounded too -> the largest code of theirs, as stock ComfyUI rounds them.
This pack gives W4A4's inputs 8 bits."""


def storage_encoding(
    name: str, container: str, shape: Shape, int8: Choice | None = None
) -> Encoding | None:
    """How a linear of ``shape`` is stored as ``name``; None where its rows do not fit.

    ``int8``: what a calibration chose for INT8; None: rotated.
    """
    columns = shape[1]
    if container == "gguf":
        return Blocks(name, shape) if columns % FORMATS[name].block_size == 0 else None
    if name == UNQUANTIZED:
        return Unquantized(torch.bfloat16)
    rotation = rotation_group(columns)
    if name in _PACKED:
        bits, group = _PACKED[name]
        if rotation is None or columns % max(PACKED_MULTIPLE, group):
            return None
        return PackedInt8(bits, group, rotation)
    if name == INT4:
        fits = rotation is not None and columns % INT4_MULTIPLE == 0
        return ConvrotInt4(rotation) if fits else None
    if int8 is None or int8.treatment is None:
        return NativeInt8(rotation)
    return NativeInt8(rotation_group(columns, ROTATION) if int8.treatment.rotated else None,
                      int8.smooth)  # fmt: skip
