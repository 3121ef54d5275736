"""Aspect ratios and picture sizes."""

from __future__ import annotations

import math
import re

from ..errors import OpError

WIDEST = 6  # the model was trained on pictures up to 6:1
_TOKEN_PIXELS = 16  # sides are multiples of it
_LONGEST = 2048  # the longest side that was trained
AUTO = "as in the caption"
RATIOS = (
    *(AUTO, "1:1", "5:4", "4:3", "3:2", "16:10", "16:9", "2:1", "3:1"),
    *("4:5", "3:4", "2:3", "10:16", "9:16", "1:2", "1:3"),
)
# name -> the side of a square of this area, in pixels
POCKET = "pocket"
SIZES = {"1K": 1024, "1.5K": 1536, "2K": 2048, POCKET: 96}
_PIXELS = 128  # the pocket model's longest side
_RATIO = re.compile(r"\s*(\d{1,5})\s*[:x/]\s*(\d{1,5})\s*")


def parse_ratio(text: object) -> tuple[int, int]:
    """(width, height) of a ratio such as ``3:2``, in lowest terms.

    OpError for what is none, has a zero, or is wider or higher than the model was trained on.
    """
    match = _RATIO.fullmatch(text) if isinstance(text, str) else None
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not width or not height:
        raise OpError(
            "this is no aspect ratio",
            found=repr(text),
            needed="width:height, such as 3:2",
            hint="Pick one in the list, or write it so into the caption's aspect_ratio.",
        )
    if max(width, height) > WIDEST * min(width, height):
        raise OpError(
            "the aspect ratio is beyond what the model was trained on",
            found=f"{width}:{height}",
            needed=f"between 1:{WIDEST} and {WIDEST}:1",
            hint="Pick one in the list; crop the picture if you need a narrower strip.",
        )
    divisor = math.gcd(width, height)
    return width // divisor, height // divisor


def picture_size(ratio: tuple[int, int], size: str) -> tuple[int, int]:
    """(width, height) in pixels of a ratio at one of ``SIZES``: multiples of 16, at most 2048.

    The sides are rounded to the nearest multiple, so that the ratio is met as nearly as they allow.
    """
    if size not in SIZES:
        raise OpError("no such size", found=repr(size), needed=" or ".join(SIZES))
    wide, high = ratio
    scale = SIZES[size] / math.sqrt(wide * high)
    longest = _PIXELS if size == POCKET else _LONGEST
    scale = min(scale, longest / max(wide, high))
    return tuple(max(1, round(side * scale / _TOKEN_PIXELS)) * _TOKEN_PIXELS for side in ratio)
