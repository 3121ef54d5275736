"""Seconds of one forward of one transformer block on a card: modelled from bytes and operations.

A product takes what its busiest unit takes, in whole waves of tiles, by the best tile of the
kernels' table for that architecture; a pass over activations the longer of its bytes and its
instructions; attention its operations. Each bound is divided by a stated efficiency. What a kernel
costs beside: a gap on the card, and the host's time to launch it, where that is longer than the
work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import OpError
from ..ops.blocks import FORMATS
from ..ops.gguf_compute import W8A8_FORMATS
from ..ops.kernels import configs
from .known import ASSUMED, Card, Efficiency
from .sizes import bits

HIDDEN, FEED_FORWARD, LAYERS = configs.HIDDEN, configs.FEED_FORWARD, 34

LINEARS: dict[str, tuple[int, int]] = {
    "qkv": (3 * HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "w1": (FEED_FORWARD, HIDDEN),
    "w3": (FEED_FORWARD, HIDDEN),
    "w2": (HIDDEN, FEED_FORWARD),
}
"""(out_features, in_features) of the products of a block."""

# What one visit of each value costs, (bytes, instructions): bf16 activations, int8 rows. The
# instructions are those of sm_86 (docs/kernels.md); other architectures have a tenth more or less.
_NORM_TO_INT8 = (2 + 1, 46)
_ROTATE_TO_INT8 = (2 + 1, 33)
_SWIGLU_TO_INT8 = (2 + 2 + 1, 46)
_RESIDUAL = (2 + 2 + 2, 19)
_HEADS_FUSED = (2 + 2, 30)
# Eager torch, one kernel an op, each reading and writing its tensors.
_HEADS_EAGER = (
    56,
    40,
)  # norm 4, to fp32 6, times cos 8, halves swapped 4 + 8, times sin 8, + 12, 6
_NORM_EAGER = (4 + 4, 20)  # norm, times 1 + scale
_SWIGLU_EAGER = (4 + 6, 15)
_RESIDUAL_EAGER = (4 + 4 + 6, 20)
# A weight: to rotated int8 of GGUF blocks (the mean of both widths), to the grid of packed codes.
_DECODE = {"Q8_0": 34, "Q4_K": 43, "Q5_K": 50, "Q6_K": 48, "Q3_K": 51, "W4A8": 13, "W6A8": 16}
_DECODE_OTHER = 45
_EPILOGUE = 1200  # instructions around the loop of a product, every warp

GAP = 1.5e-6
"""Seconds between two kernels on the card, also within a graph: assumed."""
LAUNCH = 12e-6
"""Seconds of the host to launch a kernel through torch's dispatcher: assumed."""

_DECODED = ("FP8", "NF4", "Q8_0", "Q6_K")
_INT8 = ("INT8 W8A8", "INT8 W8A8 rotated")
_ON_GRID = ("W4A8", "W6A8")


@dataclass(frozen=True)
class How:
    """How a block is run.

    ``fused``: norms, SwiGLU and residuals in the kernels around the products; ``heads_fused``: norm
    and rotary embedding of q and k in one pass; ``graphs``: the host launches a block as one.
    ``gguf_compute``: as ``LinearOptions`` has it.
    """

    fused: bool = True
    heads_fused: bool = True
    attention: Literal["flash", "int8"] = "flash"
    graphs: bool = False
    gguf_compute: Literal["auto", "w8a8"] = "auto"
    efficiency: Efficiency = ASSUMED


FUSED = How()


@dataclass(frozen=True)
class Parts:
    """Seconds by what they go into. ``host`` is what launching takes beyond the card's own time."""

    gemm: float = 0.0
    attention: float = 0.0
    heads: float = 0.0
    rows: float = 0.0
    decode: float = 0.0
    gaps: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Parts:
        """As often."""
        return Parts(*(getattr(self, f.name) * factor for f in fields(self)))


def through_int8(level: str, how: How = FUSED) -> bool:
    """Whether ``level`` runs on the INT8 units; OpError for one that the model does not know."""
    if level in _INT8 or level in _ON_GRID or level in W8A8_FORMATS:
        return True
    if level in _DECODED or level == "BF16":
        return level in FORMATS and how.gguf_compute == "w8a8"
    raise OpError("the model knows no such level", found=repr(level))


def block_seconds(card: Card, level: str, tokens: int, how: How = FUSED) -> Parts:
    """One block of ``level`` over ``tokens`` rows, its weights in the card's memory."""
    decode, products = _linears(card, level, tokens, how)
    parts = Parts(
        gemm=products,
        attention=attention_seconds(card, tokens, how),
        heads=row_seconds(
            card, tokens, 2 * HIDDEN, _HEADS_FUSED if how.heads_fused else _HEADS_EAGER, how
        ),
        rows=_rows(card, level, tokens, how),
        decode=decode,
        gaps=GAP * launches(level, how),
    )
    hidden = 0.0 if how.graphs else LAUNCH * launches(level, how)
    return parts + Parts(host=max(0.0, hidden - parts.total))


def launches(level: str, how: How) -> int:
    """Kernels of one block: counted in ``ops/fused.py`` and in the reference's block."""
    modulation = 6  # a product, two tanh, two sums, a cut
    heads = 1 if how.heads_fused else 2 * 9
    attention = 2 if how.attention == "flash" else 4
    packed = level not in ("BF16", *_INT8)
    products = len(LINEARS) * (2 if packed else 1)
    if how.fused:
        quantized = 4 if through_int8(level, how) else 0  # norm twice, o's input, SwiGLU
        values = 0 if through_int8(level, how) else 5
        return modulation + heads + attention + products + quantized + values + 2
    quantized = len(LINEARS) if through_int8(level, how) else 0
    return modulation + heads + attention + products + quantized + 2 * 2 + 2 + 2 * 3


def row_seconds(
    card: Card, rows: int, values: int, cost: tuple[float, float], how: How = FUSED
) -> float:
    """One pass over ``[rows, values]``: the longer of its bytes and its instructions."""
    nbytes, instructions = cost
    count = rows * values
    issue = count * instructions / 32 / (card.multiprocessors * 4 * card.clock)
    return max(count * nbytes / card.bandwidth, issue) / how.efficiency.bandwidth


def attention_seconds(card: Card, tokens: int, how: How = FUSED) -> float:
    """Two products of tokens x tokens x hidden, and q, k and v to int8 before them where asked."""
    work, efficiency = 4 * tokens**2 * HIDDEN, how.efficiency
    if how.attention == "flash":
        return work / (card.bf16 * efficiency.attention * card.attention)
    return work / (card.int8 * efficiency.attention_int8 * card.attention_int8) + row_seconds(
        card, tokens, 3 * HIDDEN, (2 + 1, 20), how
    )


def gemm_seconds(card: Card, m: int, n: int, k: int, how: How = FUSED) -> float:
    """``[m, k] x [n, k]`` in int8 by the best tile of the table, in whole waves."""
    tiles = configs.gemm_candidates(card.arch, m, k)
    return min(_tile_seconds(card, m, n, k, tile) for tile in tiles) / how.efficiency.gemm


def _tile_seconds(card: Card, m: int, n: int, k: int, tile: configs.GemmConfig) -> float:
    warps = tile.num_warps
    loop = 2 * tile.block_m * tile.block_n * k / card.int8_per_cycle
    around = _EPILOGUE * warps / 4
    count = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
    resident = _resident(tile, card.arch)
    waves = math.ceil(count / (card.multiprocessors * resident))
    return waves * resident * (loop + around) / card.clock


def _resident(tile: configs.GemmConfig, arch: int) -> int:
    """Programs of a tile that one multiprocessor holds: by registers and by shared memory."""
    threads = 32 * tile.num_warps
    registers = min(255, tile.block_m * tile.block_n // threads + 90)
    shared = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k
    most = {80: 164, 90: 228}.get(arch, 100) * 1024
    return max(1, min(65536 // (threads * registers), most // shared))


def _linears(card: Card, level: str, tokens: int, how: How) -> tuple[float, float]:
    """(decoding, products) of the five linears."""
    decode = products = 0.0
    for n, k in LINEARS.values():
        if through_int8(level, how):
            products += gemm_seconds(card, tokens, n, k, how)
            written = 1.0
        else:
            products += 2 * tokens * n * k / (card.bf16 * how.efficiency.gemm)
            written = 2.0
        if level not in ("BF16", *_INT8):
            cost = (bits(level) / 8 + written, _DECODE.get(level, _DECODE_OTHER))
            decode += row_seconds(card, n, k, cost, how)
    return decode, products


def _rows(card: Card, level: str, tokens: int, how: How) -> float:
    """Norms, SwiGLU, quantization and residuals."""
    h, f = HIDDEN, FEED_FORWARD
    int8 = through_int8(level, how)
    if how.fused and int8:
        passes = [(h, _NORM_TO_INT8)] * 2 + [(h, _ROTATE_TO_INT8), (f, _SWIGLU_TO_INT8)]
    else:
        passes = [(h, _NORM_EAGER)] * 2 + [(f, _SWIGLU_EAGER)]
        if int8:  # the input of each product by itself: qkv, o, w1, w3, w2
            passes += [(h, _ROTATE_TO_INT8)] * 4 + [(f, _ROTATE_TO_INT8)]
    passes += [(h, _RESIDUAL if how.fused else _RESIDUAL_EAGER)] * 2
    return sum(row_seconds(card, tokens, values, cost, how) for values, cost in passes)
