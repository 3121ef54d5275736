"""What the compiled library computes, as calls on tensors.

Every function gives the bits of a formula in torch, which is the fallback of its caller.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .compiler import load

LANES = 16
BLOCK = 256

_MOST_WIDTHS, _MOST_MOVES = 32, 16
_FINE = 0


class Search(ctypes.Structure):
    """How a K-quant's scales are searched; ``Form`` of kquants.c, field by field."""

    _fields_ = [
        *((name, c_int32) for name in ("group", "affine", "code_least", "code_most")),
        *((name, c_int32) for name in ("scale_least", "scale_most", "widths", "moves")),
        ("width", c_float * _MOST_WIDTHS),
        ("step", c_int32 * _MOST_MOVES),
        ("shift", c_int32 * _MOST_MOVES),
        ("gaussian_loss", c_float),
    ]


class Fits(NamedTuple):
    """n blocks as they are stored: codes int8 [n, groups, group], scale and minimum fp32
    [groups, n], d and dmin fp32 [n]; lost fp32 [n], the squared error; lucky bool [n]."""

    codes: Tensor
    d: Tensor
    scale: Tensor
    dmin: Tensor
    minimum: Tensor
    lost: Tensor
    lucky: Tensor


class Lost(NamedTuple):
    """Sums over weights w and what is stored for them: w^2, (stored - w)^2; the largest error."""

    signal: float
    noise: float
    largest: float


def search(
    group: int,
    codes: tuple[int, int],
    scales: tuple[int, int],
    widths: tuple[float, ...],
    moves: tuple[tuple[int, int], ...],
    *,
    affine: bool,
    gaussian_loss: float,
) -> Search:
    """The search of a format, for :func:`fit_blocks`."""
    made = Search(group, affine, *codes, *scales, len(widths), len(moves))
    made.width[: len(widths)] = widths
    for at, (step, shift) in enumerate(moves):
        made.step[at], made.shift[at] = step, shift
    made.gaussian_loss = gaussian_loss or math.inf
    return made


class Encoder:
    """The functions of a compiled library, on CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def fit_blocks(self, weights: Tensor, importance: Tensor | None, how: Search) -> Fits:
        """Fits of ``weights`` fp32 [n, 256]; importance fp32 [a row's blocks, 256] or None."""
        n, groups = len(weights), BLOCK // how.group
        weights = weights.contiguous()
        importance = None if importance is None else importance.contiguous()
        codes = torch.empty((n, groups, how.group), dtype=torch.int8)
        scale, minimum = torch.empty(2, groups, n).unbind(0)
        d, dmin, lost = torch.empty(3, n).unbind(0)
        lucky = torch.empty(n, dtype=torch.bool)
        self._library.i4q_fit_blocks(
            *(_at(weights), _at(importance), c_int64(n)),
            c_int64(1 if importance is None else len(importance)),
            *(ctypes.byref(how), _at(d), _at(dmin), _at(scale), _at(minimum)),
            *(_at(codes), _at(lost), _at(lucky)),
        )
        return Fits(codes, d, scale, dmin, minimum, lost, lucky)

    def q8_0(self, weights: Tensor) -> tuple[Tensor, Lost] | None:
        """Rows [N, K] bf16 or fp32 -> uint8 [N, K // 32 * 34] and what is lost.

        None for weights that are not finite or too large, which torch refuses with the reason.
        """
        n, k = weights.shape
        if k % 32 or weights.dtype not in (torch.bfloat16, torch.float32):
            return None
        weights, sums = weights.contiguous(), (c_double * 3)()
        blocks = torch.empty((n, k // 32 * 34), dtype=torch.uint8)
        bf16 = c_int(weights.dtype == torch.bfloat16)
        state = self._library.i4q_q8_0(_at(weights), bf16, c_int64(n * k // 32), _at(blocks), sums)
        return (blocks, Lost(*sums)) if state == _FINE else None

    def int8_rows(
        self, weights: Tensor, rotation: int | None
    ) -> tuple[Tensor, Tensor, Lost] | None:
        """Rows [N, K] bf16 or fp32 -> int8 [N, K], scale fp32 [N], what is lost.

        None for rows that are not finite, and for a rotation other than by 256.
        """
        n, k = weights.shape
        known = rotation in (None, BLOCK) and weights.dtype in (torch.bfloat16, torch.float32)
        if not known or k % BLOCK:
            return None
        weights, sums = weights.contiguous(), (c_double * 3)()
        codes, scale = torch.empty((n, k), dtype=torch.int8), torch.empty(n)
        scratch = torch.empty(k)  # PyTorch aligns to 64 bytes
        state = self._library.i4q_int8_rows(
            *(_at(weights), c_int(weights.dtype == torch.bfloat16), c_int64(n), c_int64(k)),
            *(c_int(rotation is not None), _at(codes), _at(scale), _at(scratch), sums),
        )
        return (codes, scale, Lost(*sums)) if state == _FINE else None

    def lost(self, weights: Tensor, stored: Tensor) -> Lost | None:
        """What ``stored`` lost of ``weights``, both fp32 of one shape.

        None if a value is not finite, or their number no multiple of LANES.
        """
        fits = weights.dtype == stored.dtype == torch.float32 and weights.numel() % LANES == 0
        if not fits or stored.device.type != "cpu":
            return None
        weights, stored, sums = weights.contiguous(), stored.contiguous(), (c_double * 3)()
        state = self._library.i4q_lost(_at(weights), _at(stored), c_int64(weights.numel()), sums)
        return Lost(*sums) if state == _FINE else None


def encoder_for(tensor: Tensor) -> Encoder | None:
    """The compiled encoder, for a plain tensor on the CPU where there is one."""
    plain = tensor.device.type == "cpu" and type(tensor) is Tensor
    return _encoder() if plain and not torch.compiler.is_compiling() else None


def _encoder() -> Encoder | None:
    library = load()  # which remembers it, until another is built
    return None if library is None else Encoder(library)


def _at(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())
