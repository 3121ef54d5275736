"""Device functions that the row kernels share: column order, rotation, absmax, rounding to int8.

A row of K values lives in registers as one or two blocks of a power of two values (``RowConfig``).
Only plain ``tl`` operations are used: they compile on Triton 3.2 to 3.9 and run in the interpreter.
"""

import os

import triton
import triton.language as tl

# 1.5 * 2^23: adding it leaves the integer nearest to a small number, halves to even, in the low
# bits of the sum.
ROUND_MAGIC = tl.constexpr(12582912.0)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SCALE_FLOOR = tl.constexpr(1e-30)


@triton.jit
def unit_order(units, ROTATION: tl.constexpr):
    """Which run of 16 columns a run of 16 registers holds, so that ``rotate`` ends in order."""
    if ROTATION == 256:
        units = units ^ 15
    elif ROTATION == 64:
        units = units ^ 3
    return units


@triton.jit
def columns(BLOCK: tl.constexpr, ROTATION: tl.constexpr):
    """The columns of a block of a row, in the order ``rotate`` wants."""
    index = tl.arange(0, BLOCK)
    return unit_order(index // 16, ROTATION) * 16 + index % 16


@triton.jit
def load(ptr, cols, K: tl.constexpr, PADDED: tl.constexpr):
    """``ptr[cols]`` as fp32; zeros beyond K."""
    if PADDED:
        return tl.load(ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
    return tl.load(ptr + cols).to(tl.float32)


@triton.jit
def _h4_digit(y, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """H4 / 2 along one base-4 digit of the index: ``y[i] = sum / 2 - y[3 - i]``.

    With the digit as two bits, ``y[3 - i] = sum - row - column + y[i]``, all of them sums along an
    axis, which every Triton compiles well where ``flip`` and ``split`` do not.
    """
    y = tl.reshape(y, (BLOCK // (4 * STRIDE), 2, 2, STRIDE))
    column = tl.sum(y, axis=1, keep_dims=True)
    row = tl.sum(y, axis=2, keep_dims=True)
    half = 0.5 * tl.sum(row, axis=1, keep_dims=True)
    return tl.reshape((column - y) + (row - half), (BLOCK,))


@triton.jit
def _mirrored_h4_digit(y, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """H4 / 2 along one base-4 digit of an index whose digit runs backwards: ``sum / 2 - y``."""
    y = tl.reshape(y, (BLOCK // (4 * STRIDE), 4, STRIDE))
    half = 0.5 * tl.sum(y, axis=1, keep_dims=True)
    return tl.reshape(half - y, (BLOCK,))


@triton.jit
def _opaque(y):
    """y, through a move that LLVM cannot look into.

    From sm_100 on LLVM packs pairs of fp32 operations, beginning at the stores. Of the sums of a
    rotation it makes vector shuffles that its instruction selection aborts on (Triton 3.6 to 3.9).
    """
    if INTERPRETED:
        return y
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rotate(y, BLOCK: tl.constexpr, ROTATION: tl.constexpr):
    """``y @ H`` in groups of ROTATION (4, 16, 64, 256; 0 leaves y alone), in fp32.

    ``H4 / 2 = J / 2 - P`` with J all ones and P the reversal, and ``J P = J``: so
    ``H4 / 2 = (J / 2 - I) P``. The reversals of the upper two digits are made by the addresses that
    were loaded (``unit_order``), at no cost; the lower two, inside a 16 B access, are computed.
    """
    if ROTATION >= 256:
        y = _mirrored_h4_digit(y, 64, BLOCK)
    if ROTATION >= 64:
        y = _mirrored_h4_digit(y, 16, BLOCK)
    if ROTATION >= 16:
        y = _h4_digit(y, 4, BLOCK)
    if ROTATION >= 4:
        y = _h4_digit(y, 1, BLOCK)
    return _opaque(y) if ROTATION > 0 else y


@triton.jit
def smooth_rotate(
    y,
    cols,
    smooth_ptr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """``R(y / smooth)``."""
    if HAS_SMOOTH:
        smooth = load(smooth_ptr, cols, K, PADDED)
        if PADDED:
            smooth = tl.where(cols < K, smooth, 1.0)
        y = y / smooth
    return rotate(y, BLOCK, ROTATION)


@triton.jit
def absmax(y):
    """``max |y|``, infinite where y holds a NaN, which a maximum would drop."""
    return tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=0)


@triton.jit
def row_scale(absmax):
    """``(scale, 1 / scale, keep)`` of a row; if not finite, NaN and a ``keep`` that zeroes q."""
    scale = tl.maximum(absmax / 127.0, SCALE_FLOOR)
    finite = absmax < float("inf")
    return tl.where(finite, scale, float("nan")), 1.0 / scale, tl.where(finite, -1, 0)


@triton.jit
def store_int8(
    q_ptr,
    y,
    inverse,
    keep,
    start,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``q[start + i] = round_half_even(y * inverse)``: the low byte of the sum with ROUND_MAGIC."""
    cols = start + tl.arange(0, BLOCK)
    bits = (y * inverse + ROUND_MAGIC).to(tl.int32, bitcast=True) & keep
    if PADDED:
        tl.store(q_ptr + cols, bits.to(tl.int8), mask=cols < K)
    else:
        tl.store(q_ptr + cols, bits.to(tl.int8))


@triton.jit
def store_row(
    q_ptr,
    scale_ptr,
    row,
    peak,
    head,
    tail,  # read where TAIL
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A row of values and its absmax ``peak`` -> int8 and its scale."""
    scale, inverse, keep = row_scale(peak)
    store_int8(q_ptr, head, inverse, keep, 0, K, HEAD > K, HEAD)
    if TAIL > 0:
        store_int8(q_ptr, tail, inverse, keep, HEAD, K, HEAD + TAIL > K, TAIL)
    tl.store(scale_ptr + row, scale)
