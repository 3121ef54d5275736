"""NormalFloat 4: two codes a byte, each an entry of a table times the largest value of its block.

As bitsandbytes stores it: the tensor flattened row by row, the first of two codes in a byte's high
nibble, one fp32 ``absmax`` for every ``block_size`` values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quantiles of the normal distribution, from the QLoRA paper (arXiv 2305.14314, appendix E).
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float(device: torch.device | str = "cpu") -> Tensor:
    """The NF4 table, fp32 ``[16]``, ascending."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


def decode(data: Tensor, absmax: Tensor, code: Tensor, count: int, block_size: int) -> Tensor:
    """``code[nibble] * absmax[block]``: the first ``count`` values, fp32 ``[count]``.

    ``data uint8`` of at least ``ceil(count / 2)`` bytes, ``absmax fp32`` of at least
    ``ceil(count / block_size)`` values, ``code fp32 [16]``.
    """
    packed = data.reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    values = code[nibbles.int()]
    whole = count // block_size * block_size
    if whole == count:
        scaled = values.view(-1, block_size) * absmax.reshape(-1, 1)[: whole // block_size]
        return scaled.view(-1)
    return values * absmax.reshape(-1).repeat_interleave(block_size)[:count]


def encode(
    values: Tensor, code: Tensor, block_size: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest code of ``value / absmax(block)``: ``(uint8 [ceil(n / 2)], absmax [blocks])``.

    ``values`` are flattened; a short last block and an odd count are filled with zeros. ``noise``,
    uniform in [0, 1), one a value, rounds to either neighbour in proportion instead. A block of
    zeros has absmax 0. ``code fp32 [16]`` in any order.
    """
    flat = values.reshape(-1).float()
    count = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    safe = torch.where(absmax == 0, 1.0, absmax)
    relative = (blocks / safe[:, None]).view(-1)[:count]

    table, order = code.float().sort()
    above = torch.bucketize(relative, table).clamp_(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    position = (relative - low) / (high - low)
    threshold = 0.5 if noise is None else noise.reshape(-1)
    chosen = order[torch.where(position > threshold, above, above - 1)].to(torch.uint8)

    pairs = torch.nn.functional.pad(chosen, (0, count % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], absmax
