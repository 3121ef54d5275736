"""The shape logic of every block format, written once; the formats see only rows of blocks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import OpError
from ..chunks import CACHED, ENCODED, chunk_size, even, for_each, uninitialised, workers
from ..feedback import Feedback
from ..wide import wide

log = logging.getLogger(__name__)


UNSEEN = 2e-6
"""Importance, of the mean one, up to which nothing is known of an input."""

# Means of importance between which products of it, weights and codes stay in float32.
LEAST_MEAN, LARGEST_MEAN = 1e-12, 1e12


class BlockFormat(ABC):
    """One GGUF block format: ``block_size`` weights of a row packed into ``type_size`` bytes."""

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block_size: ClassVar[int]
    type_size: ClassVar[int]
    encode_chunk: ClassVar[int] = ENCODED
    uses_importance: ClassVar[bool] = False
    knows_ggml: ClassVar[bool] = True  # whether ``encode_as_ggml`` gives ggml's bytes

    @abstractmethod
    def decode(self, blocks: Tensor, out: Tensor) -> None:
        """Write the weights of ``blocks`` uint8 [n, type_size] to ``out`` float32 [n, block_size].

        ``out`` is contiguous and holds anything; ``blocks`` may start at any even address.
        """

    @abstractmethod
    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        """Blocks uint8 [n, type_size] of ``weights`` float32 [n, block_size], all finite.

        ``importance`` float32 [row's blocks, block_size] weighs the squared errors of every row;
        formats with ``uses_importance`` get it, with whole rows, the others always get None.
        """

    def encode_as_ggml(self, weights: Tensor) -> Tensor:
        """The blocks that ggml's C code makes of ``weights``; see ``encode``."""
        return self.encode(weights, None)

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` weights. Raises OpError when blocks do not fill the row."""
        if k % self.block_size:
            raise OpError(
                f"{self.name} packs rows in blocks of {self.block_size} weights",
                found=f"a row of {k}",
                needed=f"a multiple of {self.block_size}",
                hint="Keep such a tensor in F16 or BF16, or choose a format with smaller blocks.",
            )
        return k // self.block_size * self.type_size

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of ``shape``. Raises OpError when blocks do not fill its rows."""
        if not shape or min(shape) < 0:
            raise OpError(f"not the shape of a {self.name} tensor", found=tuple(shape))
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    @torch.no_grad()
    def dequantize(self, data: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Weights of ``data`` as [*shape] ``dtype``; see :func:`dequantize` of this package."""
        shape = tuple(shape)
        needed = self.nbytes(shape)
        if not dtype.is_floating_point:
            raise OpError(f"{self.name} decodes to a float dtype", found=dtype)
        if data.dtype != torch.uint8:
            raise OpError(f"{self.name} data", found=data.dtype, needed=torch.uint8)
        if data.numel() != needed:
            raise OpError(
                f"{self.name} data of shape {list(shape)}",
                found=f"{data.numel()} bytes",
                needed=f"{needed} bytes",
            )
        blocks = data.reshape(needed // self.type_size, self.type_size)
        if not torch.compiler.is_compiling() and blocks.storage_offset() % 4:
            blocks = blocks.clone()  # the fields are read in place, as float16 and as float32
        return self._decode_chunks(blocks, dtype).view(shape)

    def _decode_chunks(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[n_blocks, block_size] in ``dtype``, decoded in float32 a chunk at a time."""
        out = uninitialised((len(blocks), self.block_size), dtype, blocks.device)
        step = chunk_size(blocks.device, CACHED) // self.block_size
        if torch.compiler.is_compiling():
            step = max(1, len(blocks))  # the compiler fuses and tiles by itself
        scratch = None
        if dtype != torch.float32:
            scratch = out.new_empty((min(step, len(blocks)), self.block_size), dtype=torch.float32)
        for start in range(0, len(blocks), step):
            chunk, target = blocks[start : start + step], out[start : start + step]
            if scratch is None:
                self.decode(chunk, target)
            else:
                self.decode(chunk, scratch[: len(chunk)])
                target.copy_(scratch[: len(chunk)])
        return out

    @torch.no_grad()
    def quantize(
        self,
        weight: Tensor,
        importance: Tensor | None,
        feedback: Feedback | None,
        as_ggml: bool,
    ) -> Tensor:
        """Bytes of ``weight``: uint8 [*, row bytes]; see :func:`quantize` of this package."""
        if as_ggml and (importance is not None or feedback is not None):
            raise OpError(f"{self.name} bytes as ggml's know no importance", hint="Leave one out.")
        if as_ggml and not self.knows_ggml:
            raise OpError(
                f"{self.name} bytes as ggml's are not made here",
                needed="a format whose encoder in ggml is at hand",
                hint="Leave as_ggml out: the error is at most ggml's.",
            )
        self._check_weight(weight, feedback)
        row_bytes = self.row_bytes(weight.shape[-1])
        blocks = weight.reshape(weight.numel() // self.block_size, self.block_size)
        importance, unseen = self._importance_blocks(importance, weight)
        out = blocks.new_empty((len(blocks), self.type_size), dtype=torch.uint8)
        step = self._blocks_at_a_time(weight, by_rows=importance is not None)

        def encode_chunk(start: int) -> None:
            chunk = blocks[start : start + step].to(torch.float32)
            if not all_finite(chunk):
                raise _not_finite(self.name, weight)
            with np.errstate(all="ignore"):  # as torch: searches meet infinities, and pass on
                encoded = self.encode_as_ggml(chunk) if as_ggml else self.encode(chunk, importance)
                if unseen is not None:
                    alone = unseen.repeat(len(chunk) // len(unseen))
                    encoded[alone] = self.encode(chunk[alone], None)
            out[start : start + step] = encoded

        for_each(range(0, len(blocks), step), encode_chunk, weight.device)
        if feedback is not None:
            self.feed_back(out.view(-1, row_bytes), weight.reshape(-1, weight.shape[-1]), feedback)
        return out.view(*weight.shape[:-1], row_bytes)

    def feed_back(self, data: Tensor, weight: Tensor, feedback: Feedback) -> None:  # noqa: B027
        """Give rows ``data`` [N, row bytes] the codes of ``feedback``; plain numbers have none."""

    def _blocks_at_a_time(self, weight: Tensor, by_rows: bool) -> int:
        """As many in every chunk, so that threads end together; with ``by_rows`` whole rows."""
        unit = max(weight.shape[-1], 1) if by_rows else self.block_size
        some = chunk_size(weight.device, self.encode_chunk) // unit
        return even(weight.numel() // unit, some, workers(weight.device)) * unit // self.block_size

    def _check_weight(self, weight: Tensor, feedback: Feedback | None) -> None:
        if not weight.is_floating_point() or weight.ndim == 0:
            raise OpError(
                f"{self.name} encodes float tensors of at least one dimension",
                found=f"{weight.dtype} {list(weight.shape)}",
            )
        if feedback is not None and len(feedback.rest) != weight.shape[-1]:
            raise OpError(
                f"{self.name} with the error feedback of another linear",
                found=f"{len(feedback.rest)} inputs",
                needed=f"{weight.shape[-1]}",
            )

    def _importance_blocks(
        self, importance: Tensor | None, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Importance [K] as float32 [K // block_size, block_size], None where it has no use; and
        which of these blocks nothing is known of, bool [K // block_size], None for none of them.
        """
        if importance is None:
            return None, None
        if importance.shape != weight.shape[-1:]:
            raise OpError(
                f"{self.name} importance holds one value a column",
                found=list(importance.shape),
                needed=list(weight.shape[-1:]),
            )
        importance = importance.to(weight.device, torch.float32)
        if not (torch.isfinite(importance) & (importance >= 0)).all():
            raise OpError(f"{self.name} importance", needed="finite values, none below zero")
        if not self.uses_importance:
            _warn_unused(self.name)
            return None, None
        mean = wide(importance).mean().item()
        if not mean > 0:
            return None, None
        floor = UNSEEN * mean
        unseen = (importance <= floor).view(-1, self.block_size).all(1)
        if not LEAST_MEAN < mean < LARGEST_MEAN:  # sums of products would leave float32
            importance, floor = (wide(importance) / mean).to(importance), UNSEEN
        blocks = importance.clamp_min(floor).reshape(-1, self.block_size)
        return blocks, unseen if bool(unseen.any()) else None


def half_field(blocks: Tensor, index: int) -> Tensor:
    """The ``index``-th float16 of every block, as float32 [n, 1]."""
    return blocks.view(torch.float16)[:, index : index + 1].to(torch.float32)


def to_half(values: Tensor) -> Tensor:
    """Float32 as float16. Raises OpError beyond its range."""
    half = values.to(torch.float16)
    overflow = int((~half.isfinite()).sum())
    if overflow:
        raise OpError(
            f"{overflow} block scales are too large for float16",
            found=float(values.abs().max()),
            needed="at most 65504",
            hint="Store this tensor as F32 or BF16.",
        )
    return half


def half_above(values: Tensor) -> Tensor:
    """``to_half``, away from zero: a step that reaches the largest scale.

    Where steps are so small that float16 rounds them by percents, a shorter one would clip it.
    """
    half = to_half(values)
    return (half.view(torch.int16) + (half.float().abs() < values.abs())).view(torch.float16)


def half_bytes(values: Tensor) -> Tensor:
    """Float32 [n] as the two bytes of float16, [n, 2]. Raises OpError beyond float16's range."""
    return to_half(values).view(-1, 1).view(torch.uint8)


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Correctly rounded ``numerator / denominator``; a plain number becomes a tensor first.

    PyTorch multiplies by a rounded reciprocal for ``number / tensor`` (everywhere) and for
    ``tensor / number`` (on CUDA); either may be off by an ulp and so change a code.
    """
    if not isinstance(numerator, Tensor):
        numerator = denominator.new_full((), numerator)
    if not isinstance(denominator, Tensor):
        denominator = numerator.new_full((), denominator)
    return torch.div(numerator, denominator)


def signed_peak(values: Tensor, dim: int) -> Tensor:
    """The entry of largest magnitude along ``dim`` with its sign; the first one where two tie."""
    high, low = values.amax(dim), values.amin(dim)
    peak = torch.where(high > -low, high, low)
    tied = high == -low
    if tied.any():  # rare, and argmax is twenty times slower than amax
        rows = values.movedim(dim, -1)[tied]
        peak[tied] = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return peak


def all_finite(values: Tensor) -> bool:
    """Extremes show infinities and pass NaN on, in a tenth of isfinite's time."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def _not_finite(name: str, weight: Tensor) -> OpError:
    count = sum(int((~torch.isfinite(row.to(torch.float32))).sum()) for row in weight.split(4096))
    return OpError(
        f"{name} cannot encode NaN or infinity",
        found=f"{count} non-finite weights of {weight.numel()}",
        needed="finite weights",
        hint="The source file is damaged, or the weights overflow float32.",
    )


@cache
def _warn_unused(name: str) -> None:
    """Logged once a format."""
    log.warning("importance has no effect on %s: there is nothing to search", name)
