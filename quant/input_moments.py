"""Which inputs of a linear are loud, and which are loud together: E[x x^T] in little memory.

The matrix has K^2 values, 600 MB for w2. A calibration keeps its diagonal, its product with a few
columns of random signs (the sketch) and, unless told otherwise, its blocks along the diagonal; all
are sums, so that runs can be added. Nystrom's formula makes of the sketch the directions in which
most of the inputs' energy lies: what it gives is never more than the true matrix. With the blocks,
rounding knows all pairs of inputs that lie near each other, and the loud ones among the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..ops.feedback import Feedback, output_energy
from ..ops.gptq import ExactFeedback
from ..ops.rotation import rotate
from ..ops.wide import wide, wide_sum

DIRECTIONS = 16
"""Columns of a sketch: twice as many gain up to 1.7 dB more at Q4_K on the pocket model
(``bench_importance.py``), for twice the file and twice the time of rounding."""

BLOCK = 512
"""Inputs of a block of the moments: 25 MB a linear for w2, 9 MB for the others, 2 GB a copy. On the
pocket model's 256 and 768 inputs (W4A8, 16 captions, latent SQNR as trained, loud channels, loud
tokens) a sketch of 64 columns alone gives 28.8, 24.7, 28.4 dB, with blocks of 64 beside one of 16
columns 29.0, 27.6, 29.1, and all pairs 29.8, 28.4, 29.8."""

# Energy of a direction, as a share of the strongest, below which it is rounding of the sums.
_NOISE = 1e-6
# Mean square of an input that calibration never saw, of their mean: another prompt may bring it.
_UNSEEN = 1e-6
# Mean square below which inputs count as zero: of the quietest ones fp32 could not hold it.
_SILENCE = 1e-20
_SMALLEST = 1e-30
# Share of an input's mean square that directions explain, beyond which the sums are wrong: in exact
# sums it is 1 at most.
_IMPOSSIBLE = 1.01
# Power of what calibration did not see, of the typical input's: feedback would else pile errors on
# inputs that were silent (channels of w2 that only some words wake), for hardly any gain: pictures
# of the pocket model at Q4_K lose 3 dB of latent SQNR without it.
_DAMPING = 0.3
_BLOCK_DAMPING = 0.1  # with blocks: 0.03 and 0.3 are within 0.4 dB of it, no worse


@dataclass(frozen=True, eq=False)
class InputMoments:
    """``E[x x^T] ~ diag(rest) + directions @ directions.T``, with ``square`` on its diagonal.

    square: fp32 [K], the mean square of each input, above zero; directions: fp32 [K, r]; blocks:
    fp32 [G, B, B] or None, E[x x^T] of B neighbouring inputs each, the last one's zeros beyond K.
    """

    square: Tensor
    directions: Tensor
    blocks: Tensor | None = None

    @property
    def rest(self) -> Tensor:
        """What no direction explains of ``square``: fp32 [K]."""
        return (self.square - self.directions.square().sum(1)).clamp_min(0)

    def output_energy(self, rows: Tensor) -> float:
        """Mean square of the outputs of a weight's ``rows`` [N, K], or of their error: the sum."""
        return wide_sum(output_energy(rows, self.rest, self.directions)).item()

    def scaled(self, factors: Tensor) -> InputMoments:
        """Of the inputs ``x * factors`` [K], none of them zero."""
        factors = factors.to(self.square)
        blocks = self.blocks
        if blocks is not None:
            runs = _in_blocks(factors, blocks.shape[1])
            blocks = blocks * runs[:, :, None] * runs[:, None]
        directions = self.directions * factors[:, None]
        return InputMoments(self.square * factors.square(), directions, blocks)

    def rotated(self, group: int) -> InputMoments:
        """Of the inputs ``rotate(x, group)``; what is not known spreads evenly over a group."""
        directions = rotate(self.directions.t().contiguous(), group).t().contiguous()
        blocks = self.blocks
        if blocks is not None and blocks.shape[1] % group == 0:
            turned = rotate(rotate(blocks, group).transpose(1, 2).contiguous(), group)
            square = turned.diagonal(dim1=1, dim2=2).reshape(-1)[: len(self.square)]
            return InputMoments(square.clamp_min(_SMALLEST), directions, turned)
        spread = self.rest.view(-1, group).mean(1).repeat_interleave(group)
        return InputMoments(spread + directions.square().sum(1), directions)

    def damped(self) -> InputMoments:
        """With noise added, of equal power on all inputs; the typical one is ``(mean rms)^2``."""
        share = _DAMPING if self.blocks is None else _BLOCK_DAMPING
        noise = share * self.square.sqrt().mean().square()
        blocks = self.blocks
        if blocks is not None:
            blocks = blocks + torch.eye(blocks.shape[1]).to(blocks) * noise
        return InputMoments(self.square + noise, self.directions, blocks)

    def feedback(self, run: int = 1) -> Feedback | ExactFeedback | None:
        """How to round weights of these inputs; None where nothing is known of pairs.

        ``run``: columns whose scale may be refitted on the way, see ``ExactFeedback``.
        """
        if self.blocks is not None:
            return ExactFeedback(self.matrix(), run)
        return Feedback(self.square, self.directions) if self.directions.shape[1] else None

    def matrix(self) -> Tensor:
        """fp64 [K, K]: the blocks, and between them what the directions say."""
        k, width = len(self.square), self.blocks.shape[1]
        directions = wide(self.directions)
        found = directions @ directions.t()
        for at, block in enumerate(self.blocks):
            place = slice(at * width, min((at + 1) * width, k))
            size = place.stop - place.start
            found[place, place] = wide(block[:size, :size])
        found.diagonal().copy_(wide(self.square))
        return found


def block_sums(x: Tensor, width: int = BLOCK) -> Tensor:
    """``sum over rows of x_b x_b^T`` of runs of ``width`` columns: [T, K] -> fp32 [G, B, B].

    B is ``width``, or K where that is less; the last block is zero beyond K.
    """
    k = x.shape[1]
    width = min(width, k)
    sums = x.new_zeros((-(-k // width), width, width), dtype=torch.float32)
    for at, total in enumerate(sums):
        part = x[:, at * width : (at + 1) * width].float()
        size = part.shape[1]
        total[:size, :size] = part.t() @ part
    return sums


def _in_blocks(values: Tensor, width: int) -> Tensor:
    """[K] -> [G, width], zero beyond K."""
    count = -(-len(values) // width)
    return torch.nn.functional.pad(values, (0, count * width - len(values))).view(count, width)


def sketch(x: Tensor, columns: int = DIRECTIONS) -> Tensor:
    """``sum over rows of x (x . signs)``: fp32 [T, K] -> fp32 [K, columns]."""
    return x.t() @ (x @ signs(x.shape[1], columns).to(x.device))


@lru_cache(maxsize=16)
def signs(features: int, columns: int) -> Tensor:
    """fp32 [features, columns] of 1 and -1, the same ones everywhere and always."""
    draws = np.random.Philox(key=0).random_raw(features * columns)
    return torch.from_numpy(np.where(draws >> np.uint64(63), -1.0, 1.0)).float().view(-1, columns)


def input_moments(
    square_sum: Tensor, sums: Tensor, tokens: int, blocks: Tensor | None = None
) -> InputMoments | None:
    """Of sums over ``tokens`` inputs: squares fp64 [K], sketch fp32 [K, r], blocks fp32 [G, B, B]
    if they were summed; None for silence.

    Where sums contradict each other, so that directions explain more than all of an input, they are
    shortened to that.
    """
    square = wide(square_sum) / tokens
    mean = square.mean()
    if not bool(mean > _SILENCE):
        return None
    square = square.clamp_min(_UNSEEN * mean.item())
    directions = _directions(wide(sums) / tokens)
    explained = directions.square().sum(1) / square
    excess = torch.where(explained > _IMPOSSIBLE, explained, 1.0)
    directions = (directions / excess.sqrt()[:, None]).float()
    mean_blocks = None if blocks is None else blocks / tokens
    return InputMoments(square.float(), directions, mean_blocks)


def _directions(product: Tensor) -> Tensor:
    """V fp64 [K, r] with ``V V^T = Y (S^T Y)^+ Y^T``, for ``Y = C S`` of signs S."""
    core = signs(*product.shape).double().t() @ product
    energies, axes = torch.linalg.eigh((core + core.t()) / 2)
    kept = energies > _NOISE * energies[-1:].clamp_min(0)
    return product @ axes[:, kept] / energies[kept].sqrt()
