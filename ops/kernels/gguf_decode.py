"""GGUF blocks in registers: the decoders inside the kernels of ``gguf.py`` and ``gguf_floats.py``.

In every format 16 adjacent weights, a *unit*, share their scale, their minimum and the way their
codes lie in 16 adjacent bytes. Scales are read once a unit; codes once a weight, as one run over
the row, which keeps a unit in one thread and a rotation group of 256 in half a warp.
The block layouts are drawn in ``ops/blocks``.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from ..codes import IQ4
from .primitives import columns, rotate, unit_order

# The table of IQ4_NL and IQ4_XS, four int8 a word, the first one lowest.
_IQ4_WORDS = np.array(IQ4.values, dtype=np.int8).view(np.int32).tolist()
_IQ4_0, _IQ4_1 = tl.constexpr(_IQ4_WORDS[0]), tl.constexpr(_IQ4_WORDS[1])
_IQ4_2, _IQ4_3 = tl.constexpr(_IQ4_WORDS[2]), tl.constexpr(_IQ4_WORDS[3])


@triton.jit
def _half(bytes_ptr, at, mask):
    """The little-endian float16 at byte ``at``, in fp32. Blocks that hold one have even sizes."""
    words = tl.load((bytes_ptr + at).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0)
    return words.to(tl.float32)


@triton.jit
def _byte(bytes_ptr, at, mask):
    """Unsigned bytes as int32."""
    return tl.load(bytes_ptr + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    """0 to 255 as two's complement."""
    return (byte << 24) >> 24


@triton.jit
def _spread(values, BLOCK: tl.constexpr):
    """One value a unit -> one a weight, ``[BLOCK // 16] -> [BLOCK]``."""
    return tl.reshape(tl.broadcast_to(values[:, None], (BLOCK // 16, 16)), (BLOCK,))


@triton.jit
def _legacy(bytes_ptr, unit, in_row, column, mask, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: blocks of two units; see ``ops/blocks/legacy.py``."""
    HAS_MINIMUM: tl.constexpr = FORMAT == "Q4_1" or FORMAT == "Q5_1"
    FIVE_BITS: tl.constexpr = FORMAT == "Q5_0" or FORMAT == "Q5_1"
    HIGH_AT: tl.constexpr = 4 if HAS_MINIMUM else 2
    LOW_AT: tl.constexpr = HIGH_AT + (4 if FIVE_BITS else 0)
    SIZE: tl.constexpr = 34 if FORMAT == "Q8_0" else LOW_AT + 16

    scale = _spread(_half(bytes_ptr, (unit // 2) * SIZE, in_row), BLOCK)
    if FORMAT == "Q8_0":
        code = _byte(bytes_ptr, (column // 32) * SIZE + 2 + column % 32, mask)
        return _signed(code).to(tl.float32) * scale
    low = _byte(bytes_ptr, (column // 32) * SIZE + LOW_AT + column % 16, mask)
    code = (low >> (4 * ((column // 16) % 2))) & 15
    if FIVE_BITS:
        at = (unit // 2) * SIZE + HIGH_AT + 2 * (unit % 2)
        high = _byte(bytes_ptr, at, in_row) | (_byte(bytes_ptr, at + 1, in_row) << 8)
        code |= ((_spread(high, BLOCK) >> (column % 16)) & 1) << 4
    if HAS_MINIMUM:
        minimum = _spread(_half(bytes_ptr, (unit // 2) * SIZE + 2, in_row), BLOCK)
        return code.to(tl.float32) * scale + minimum
    CENTRE: tl.constexpr = 16 if FIVE_BITS else 8
    return (code - CENTRE).to(tl.float32) * scale


@triton.jit
def _affine_k(bytes_ptr, unit, in_row, column, mask, BLOCK: tl.constexpr, FIVE_BITS: tl.constexpr):
    """Q4_K and Q5_K: 8 groups of two units, six bits a scale; see ``ops/blocks/kquants.py``."""
    SIZE: tl.constexpr = 176 if FIVE_BITS else 144
    LOW_AT: tl.constexpr = 48 if FIVE_BITS else 16
    block = (unit // 16) * SIZE
    group = (unit % 16) // 2
    at = block + 4 + group % 4
    first = _byte(bytes_ptr, at, in_row)
    second = _byte(bytes_ptr, at + 4, in_row)
    third = _byte(bytes_ptr, at + 8, in_row)
    upper = group >= 4
    step = tl.where(upper, (third & 15) | ((first >> 2) & 48), first & 63).to(tl.float32)
    floor = tl.where(upper, (third >> 4) | ((second >> 2) & 48), second & 63).to(tl.float32)
    scale = _spread(_half(bytes_ptr, block, in_row) * step, BLOCK)
    minimum = _spread(_half(bytes_ptr, block + 2, in_row) * floor, BLOCK)

    start = (column // 256) * SIZE
    group = (column % 256) // 32
    low = _byte(bytes_ptr, start + LOW_AT + (group // 2) * 32 + column % 32, mask)
    code = (low >> (4 * (group % 2))) & 15
    if FIVE_BITS:
        high = _byte(bytes_ptr, start + 16 + column % 32, mask)
        code |= ((high >> group) & 1) << 4
    return code.to(tl.float32) * scale - minimum


@triton.jit
def _q6_k(bytes_ptr, unit, in_row, column, mask, BLOCK: tl.constexpr):
    """Q6_K: 16 units with an int8 scale each; see ``ops/blocks/kquants.py``."""
    SIZE: tl.constexpr = 210
    block = (unit // 16) * SIZE
    step = _signed(_byte(bytes_ptr, block + 192 + unit % 16, in_row)).to(tl.float32)
    scale = _spread(_half(bytes_ptr, block + 208, in_row) * step, BLOCK)

    start = (column // 256) * SIZE
    side = (column % 256) // 128
    run = (column % 128) // 32
    low = _byte(bytes_ptr, start + 64 * side + 32 * (run % 2) + column % 32, mask)
    high = _byte(bytes_ptr, start + 128 + 32 * side + column % 32, mask)
    code = ((low >> (4 * (run // 2))) & 15) | (((high >> (2 * run)) & 3) << 4)
    return (code - 32).to(tl.float32) * scale


@triton.jit
def _low_k(bytes_ptr, unit, in_row, column, mask, BLOCK: tl.constexpr, THREE_BITS: tl.constexpr):
    """Q2_K and Q3_K: 16 units with a scale each; see ``ops/blocks/kquants_low.py``."""
    SIZE: tl.constexpr = 110 if THREE_BITS else 84
    CODES_AT: tl.constexpr = 32 if THREE_BITS else 16
    start = (column // 256) * SIZE
    side = (column % 256) // 128
    run = (column % 128) // 32
    low = _byte(bytes_ptr, start + CODES_AT + 32 * side + column % 32, mask)
    code = (low >> (2 * run)) & 3

    block = (unit // 16) * SIZE
    group = unit % 16
    if THREE_BITS:
        high = _byte(bytes_ptr, start + column % 32, mask)
        code |= ((high >> (4 * side + run)) & 1) << 2
        low = _byte(bytes_ptr, block + 96 + group % 8, in_row) >> (4 * (group // 8))
        high = _byte(bytes_ptr, block + 104 + group % 4, in_row) >> (2 * (group // 4))
        step = (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
        scale = _spread(_half(bytes_ptr, block + 108, in_row) * step, BLOCK)
        return (code - 4).to(tl.float32) * scale
    both = _byte(bytes_ptr, block + group, in_row)
    scale = _half(bytes_ptr, block + 80, in_row) * (both & 15).to(tl.float32)
    minimum = _half(bytes_ptr, block + 82, in_row) * (both >> 4).to(tl.float32)
    return code.to(tl.float32) * _spread(scale, BLOCK) - _spread(minimum, BLOCK)


@triton.jit
def _iq4_entry(place):
    """The table's entry at ``place`` 0 .. 15, int32: a byte of one of four words."""
    first = tl.where((place & 4) == 0, _IQ4_0, _IQ4_1)
    second = tl.where((place & 4) == 0, _IQ4_2, _IQ4_3)
    word = tl.where((place & 8) == 0, first, second).to(tl.int32)
    return (word << (24 - 8 * (place & 3))) >> 24


@triton.jit
def _e2m1_entry(place):
    """The values of e2m1 doubled, int32: 0, 1, 2, 3, 4, 6, 8, 12, then negative."""
    size = place & 7
    value = tl.where(size < 4, size, (2 + (size & 1)) << tl.maximum(size // 2 - 1, 0))
    return tl.where((place & 8) == 0, value, -value)


@triton.jit
def _table(bytes_ptr, unit, in_row, column, mask, BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """IQ4_NL, IQ4_XS and MXFP4: codes are places in a table; see ``ops/blocks/tables.py``."""
    if FORMAT == "IQ4_XS":
        block = (unit // 16) * 136
        group = (unit % 16) // 2
        low = _byte(bytes_ptr, block + 4 + group // 2, in_row) >> (4 * (group % 2))
        high = _byte(bytes_ptr, block + 2 + group // 4, in_row) >> (2 * (group % 4))
        step = (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
        scale = _half(bytes_ptr, block, in_row) * step
        at = (column // 256) * 136 + 8 + 16 * ((column % 256) // 32)
    elif FORMAT == "IQ4_NL":
        scale = _half(bytes_ptr, (unit // 2) * 18, in_row)
        at = (column // 32) * 18 + 2
    else:
        power = _byte(bytes_ptr, (unit // 2) * 17, in_row)
        bits = tl.where(power < 2, 0x00200000 * (power + 1), (power - 1) << 23)
        scale = bits.to(tl.int32).to(tl.float32, bitcast=True)
        at = (column // 32) * 17 + 1
    place = (_byte(bytes_ptr, at + column % 16, mask) >> (4 * ((column // 16) % 2))) & 15
    entry = _e2m1_entry(place) if FORMAT == "MXFP4" else _iq4_entry(place)
    return entry.to(tl.float32) * _spread(scale, BLOCK)


@triton.jit
def decode(
    bytes_ptr,
    start,  # a multiple of 256, or of BLOCK where that is less
    K,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """Rotated weights ``start .. start + BLOCK`` of a row, zeros beyond K."""
    unit = start // 16 + unit_order(tl.arange(0, BLOCK // 16), ROTATION)
    column = start + columns(BLOCK, ROTATION)
    in_row = unit < K // 16
    mask = column < K
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        y = _affine_k(bytes_ptr, unit, in_row, column, mask, BLOCK, FORMAT == "Q5_K")
    elif FORMAT == "Q6_K":
        y = _q6_k(bytes_ptr, unit, in_row, column, mask, BLOCK)
    elif FORMAT == "Q2_K" or FORMAT == "Q3_K":
        y = _low_k(bytes_ptr, unit, in_row, column, mask, BLOCK, FORMAT == "Q3_K")
    elif FORMAT == "IQ4_NL" or FORMAT == "IQ4_XS" or FORMAT == "MXFP4":
        y = _table(bytes_ptr, unit, in_row, column, mask, BLOCK, FORMAT)
    else:
        y = _legacy(bytes_ptr, unit, in_row, column, mask, BLOCK, FORMAT)
    return rotate(y, BLOCK, ROTATION)
