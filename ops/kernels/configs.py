"""Static launch configurations, one table an architecture: data alone, without torch or Triton.

The launchers pick from these tables by shape, and the offline proof (``offline.py``) compiles every
entry, so no configuration runs on a card that was not looked at as machine code first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HIDDEN, FEED_FORWARD, TEXT_ENCODER, TEXT_FEATURES = 4608, 12288, 4096, 53248
"""Lengths of Ideogram 4's rows: hidden, SwiGLU, a layer of the text encoder, ``llm_cond_proj``."""

HEAD = 256
"""Values of an attention head."""

ARCHITECTURES = (80, 86, 89, 90, 120)
"""Compute capabilities that are compiled and checked: A100, RTX 30, RTX 40, H100, RTX 50."""


def table_architecture(capability: int) -> int:
    """The checked architecture whose cubins a GPU of ``capability`` runs or resembles: 87 -> 86."""
    same_family = [a for a in ARCHITECTURES if a // 10 == capability // 10 and a <= capability]
    if not same_family:
        raise ValueError(f"no configurations for sm_{capability}; there are {ARCHITECTURES}")
    return max(same_family)


def unsupported_by(triton_version: str, arch: int) -> str | None:
    """Why this Triton cannot compile for ``arch``, or None. It would abort the process."""
    if arch >= 100 and release(triton_version) < (3, 3):
        return f"Triton {triton_version} does not know sm_{arch}; 3.3 is the first that does"
    return None


def release(version: str) -> tuple[int, int]:
    """``"3.7.1+git"`` -> ``(3, 7)``."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class GemmConfig:
    """One tiling of ``int8_gemm``: the tile, warps, pipeline stages, tiles of M that share N's.

    Every iteration takes two products ``block_k / 2`` deep; ``in_features`` must be a multiple of
    ``block_k``.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} {self.num_warps} warps {self.num_stages} stages"


@dataclass(frozen=True)
class RowConfig:
    """How one program covers a row of K values: a head and a tail, powers of two, and its warps.

    Both lie in registers. A power of two is what a Triton block must be; padding 4608 values to
    8192 would waste 44 % of the arithmetic, 4096 + 512 wastes none.
    """

    head: int
    tail: int
    num_warps: int


_WIDE = GemmConfig(128, 256, 128, num_warps=8, num_stages=3)
_TALL = GemmConfig(256, 128, 128, num_warps=8, num_stages=3)
_FLAT = GemmConfig(64, 128, 128, num_warps=4, num_stages=4)
# Half the tile, so that few rows make enough programs to fill the card.
_FLAT_HALF = GemmConfig(64, 64, 128, num_warps=4, num_stages=4)
_THIN = GemmConfig(16, 128, 128, num_warps=4, num_stages=4)
_THIN_HALF = GemmConfig(16, 64, 128, num_warps=4, num_stages=5)
# For K that is a multiple of 64 and not of 128, and where two of them fit a multiprocessor.
_SQUARE_64 = GemmConfig(128, 128, 64, num_warps=4, num_stages=4)
_FLAT_64 = GemmConfig(64, 128, 64, num_warps=4, num_stages=4)
_THIN_64 = GemmConfig(16, 128, 64, num_warps=4, num_stages=4)
# Two on a multiprocessor of the data center, whose shared memory is larger.
_SQUARE = GemmConfig(128, 128, 128, num_warps=4, num_stages=3)
_SQUARE_8 = GemmConfig(128, 128, 128, num_warps=8, num_stages=3)
_DEEP = GemmConfig(128, 256, 128, num_warps=8, num_stages=4)

_FEW_ROWS = {"flat": (_FLAT, _FLAT_HALF, _FLAT_64), "thin": (_THIN, _THIN_HALF, _THIN_64)}
_GEFORCE = {"wide": (_WIDE, _TALL, _SQUARE_64), **_FEW_ROWS}

GEMM_CONFIGS: dict[int, dict[str, tuple[GemmConfig, ...]]] = {
    80: {"wide": (_WIDE, _TALL, _SQUARE, _SQUARE_64), **_FEW_ROWS},
    86: _GEFORCE,
    89: _GEFORCE,
    90: {"wide": (_WIDE, _DEEP, _SQUARE_8, _SQUARE_64), **_FEW_ROWS},
    120: _GEFORCE,
}
"""``GEMM_CONFIGS[arch][shape class]``: the tilings to choose from, the default first.

All of them compile without spills, at most 2.1 instructions an integer product where wide on sm_8x
and 120. Which one is fastest is measured when a model is loaded.
"""

MAX_ROW = 16384
"""Longest row that one program holds in registers (16 warps)."""

LONG_ROW = RowConfig(head=4096, tail=0, num_warps=8)
"""How longer rows are walked, twice: only ``llm_cond_proj`` has one, of 53248 values."""

DECODED = RowConfig(head=4096, tail=0, num_warps=8)
"""How weights are decoded to floats: as many a program as make whole sectors of every format."""

MAX_HEAD, ROPE_ROWS, ROPE_WARPS = 1024, 8, 4
"""Longest head of ``rms_rope``, and how one program covers heads: 8 of 256 values by 4 warps."""


def table_digest() -> str:
    """A short hash of these tables: what was measured with others is no measure of these."""
    rows = [row_blocks(k) for k in (256, TEXT_ENCODER, HIDDEN, FEED_FORWARD, TEXT_FEATURES)]
    return hashlib.sha256(repr((GEMM_CONFIGS, rows)).encode()).hexdigest()[:16]


def shape_class(m: int) -> str:
    """``"thin"`` up to 16 rows, ``"flat"`` up to 256, ``"wide"`` above: what bounds the time."""
    if m <= 16:
        return "thin"
    return "flat" if m <= 256 else "wide"


def gemm_candidates(arch: int, m: int, k: int) -> tuple[GemmConfig, ...]:
    """Configurations for ``[m, k] x [n, k]``, the default first; empty if no tile fits ``k``."""
    fitting = (c for c in GEMM_CONFIGS[arch][shape_class(m)] if k % c.block_k == 0)
    return tuple(fitting) if k > 0 else ()


def row_config(k: int) -> RowConfig:
    """The cover of a row of ``k`` values: the largest power of two in it, and one for the rest.

    ``head + tail >= k``; where they are equal no load needs a mask. Multiples of 256 give blocks
    that are multiples of 256, so every rotation group lies in one of the two. ``k`` is at most
    ``MAX_ROW``.
    """
    head = max(1 << (k.bit_length() - 1), 16)
    rest = k - head
    tail = max(1 << (rest - 1).bit_length(), 16) if rest > 0 else 0
    # 16 to 32 values a thread: about 40 registers, so the multiprocessor fills up with warps.
    num_warps = min(max(head // 512, 1), 16)
    return RowConfig(head, tail, num_warps)


def row_blocks(k: int) -> tuple[dict[str, int], int]:
    """Constants and warps of the kernel that takes a row of ``k`` values."""
    if k > MAX_ROW:
        return {"K": k, "BLOCK": LONG_ROW.head}, LONG_ROW.num_warps
    cover = row_config(k)
    return {"K": k, "HEAD": cover.head, "TAIL": cover.tail}, cover.num_warps
