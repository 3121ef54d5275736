"""What there is to measure within the kernels: tiles, and whose norms and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from .. import dispatch, kitchen_rope
from ..kernels import configs
from . import choices
from .choices import ROPE, TILE, Key, dtype_name
from .job import Job, random_values, some_rows

_FEW = {"flat": 256, "thin": 16}
"""Tokens at which the tiles of a class of few rows are timed, once, with the fewest of the many."""


def rope_job(
    heads: tuple[int, int], device: torch.device, dtype: torch.dtype, tokens: int
) -> Iterator[Job]:
    names = kitchen_rope.candidates(device, dtype, heads[1])
    if len(names) < 2:
        return
    number, size = heads

    def make(count: int) -> Mapping[str, Callable[[], Tensor]]:
        q, k, _ = random_values((1, count, 3, number, size), device, dtype).unbind(2)
        weight = torch.ones(size, device=device, dtype=dtype)
        table = random_values((1, count, 1, size // 2, 2, 2), device, torch.float32)
        ours = lambda: kitchen_rope.rms_rope_split_half(q, k, table, weight)[0]
        own = lambda: kitchen_rope.kitchen(q, k, weight, table)
        return {kitchen_rope.OURS: ours, kitchen_rope.KITCHEN: own}

    nbytes = tokens * size * (5 * number * dtype.itemsize + 8)
    key = Key(ROPE, number, size, choices.rounded(tokens), dtype_name(dtype))
    yield Job(key, names, nbytes, make)


def tile_job(
    n: int, k: int, device: torch.device, dtype: torch.dtype, tokens: int, memory: int
) -> Iterator[Job]:
    """The tiles that the table lists for the architecture, on the product of ``[n, k]``."""
    if dispatch.choose("rms_rope", (1, 1, 1), device).name != "triton":
        return
    from ..kernels import launch

    arch = launch.architecture(device)
    counts = [tokens, *_FEW.values()] if tokens <= choices.TOKEN_STEP else [tokens]
    for count in counts:
        tiles = {str(tile): tile for tile in configs.gemm_candidates(arch, count, k)}
        rows = some_rows(n, k, device, (memory - count * k) // (k + count * dtype.itemsize))
        nbytes = count * k + rows * (k + count * dtype.itemsize)
        kind = configs.shape_class(count)
        key = Key(TILE, n, k, count, dtype_name(dtype), kind)
        if len(tiles) > 1:
            make = partial(_products, tiles, rows, k, device, dtype)
            yield Job(key, tuple(tiles), nbytes, make, scale=n / rows)


def _products(
    tiles: Mapping[str, configs.GemmConfig],
    rows: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype,
    count: int,
) -> Mapping[str, Callable[[], Tensor]]:
    from ..kernels import int8_gemm

    q, weight = (random_values((m, k), device, torch.int8) for m in (count, rows))
    scales = (torch.full((m,), 1e-3, device=device) for m in (count, rows))
    operands = (q, next(scales), weight, next(scales), None, dtype)
    return {name: partial(int8_gemm, *operands, config=tile) for name, tile in tiles.items()}
