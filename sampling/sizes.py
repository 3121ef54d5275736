"""Sizes of pictures: from a ratio and an area, and on the grid of tokens."""

from __future__ import annotations

import math

from ..errors import OpError
from .schedule import TOKEN_PIXELS

RATIOS = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9", "4:5", "3:4", "2:3", "9:16", "1:2")
"""Width to height, as people name them; all are within what the model was trained on."""

_MEGAPIXEL = 1 << 20  # as ComfyUI's own resolution selector counts: 1 is 1024 x 1024


def on_grid(width: int, height: int) -> tuple[tuple[int, int], str | None]:
    """((width, height) in the nearest multiples of 16, what to say where they differ)."""
    near = _nearest(width), _nearest(height)
    if near == (width, height):
        return near, None
    return near, (
        f"{width}x{height} was rounded to {near[0]}x{near[1]}: sides are multiples of "
        f"{TOKEN_PIXELS}"
    )


def size_of(ratio: str, megapixels: float) -> tuple[int, int]:
    """(width, height) in multiples of 16, nearest to a ratio such as ``16:9`` and to an area."""
    left, colon, right = ratio.partition(":")
    if not (colon and left.isdecimal() and right.isdecimal() and int(left) and int(right)):
        raise OpError("no aspect ratio", found=repr(ratio), needed="two numbers such as 16:9")
    if not 0 < megapixels < math.inf:
        raise OpError("no area", found=megapixels, needed="megapixels above 0, such as 1")
    shape = int(left) / int(right)
    height = math.sqrt(megapixels * _MEGAPIXEL / shape)
    return _nearest(height * shape), _nearest(height)


def _nearest(side: float) -> int:
    return max(math.floor(side / TOKEN_PIXELS + 0.5), 1) * TOKEN_PIXELS
