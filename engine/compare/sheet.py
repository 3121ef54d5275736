"""Contact sheets: prompts down, systems across, the reference first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

_INK, _SOFT, _PAPER, _GAP = (25, 25, 28), (110, 110, 115), (255, 255, 255), (228, 228, 230)
_MARGIN, _SPACE = 16, 8

#: Differences are shown this many times too strong.
DIFFERENCE_GAIN = 8


def contact_sheet(
    rows: Sequence[str],
    columns: Sequence[str],
    cell: Callable[[int, int], tuple[Image.Image | None, str]],
    *,
    title: str = "",
    width: int = 240,
) -> Image.Image:
    """A labelled grid; ``cell(row, column)`` gives a picture (``None``: a grey gap) and a caption.

    ``width`` is that of a cell in px; small pictures are enlarged by whole factors, unsmoothed.
    """
    cells = [[cell(r, c) for c in range(len(columns))] for r in range(len(rows))]
    sizes = [image.size for line in cells for image, _ in line if image is not None]
    widest = max((w for w, _ in sizes), default=width)
    if widest < width:  # whole factors need a whole multiple
        width = widest * round(width / widest)
    height = round(width * max((h / w for w, h in sizes), default=1.0))
    small, large = _font(13), _font(20)
    label = 8 + max((_text_width(small, text) for text in rows), default=0)
    top = _MARGIN + (34 if title else 0) + 24
    step_x, step_y = width + _SPACE, height + 22 + _SPACE
    size = (2 * _MARGIN + label + step_x * len(columns), top + step_y * len(rows) + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, font=large, fill=_INK)
    for c, text in enumerate(columns):
        x = _MARGIN + label + step_x * c
        draw.text((x, top - 20), _fit(small, text, width), font=small, fill=_INK)
    for r, line in enumerate(cells):
        y = top + step_y * r
        draw.text((_MARGIN, y + height // 2 - 8), rows[r], font=small, fill=_INK)
        for c, (image, text) in enumerate(line):
            x = _MARGIN + label + step_x * c
            if image is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=_GAP)
            else:
                fitted = _scaled(image, width, height)
                sheet.paste(fitted, (x + (width - fitted.width) // 2, y))
            draw.text((x, y + height + 2), _fit(small, text, width), font=small, fill=_SOFT)
    return sheet


def difference_map(reference: Image.Image, picture: Image.Image) -> Image.Image:
    """``|picture - reference| * 8`` a channel, clipped: black where the two agree."""
    difference = ImageChops.difference(reference.convert("RGB"), picture.convert("RGB"))
    strong = np.asarray(difference, dtype=np.uint16) * DIFFERENCE_GAIN
    return Image.fromarray(strong.clip(0, 255).astype(np.uint8))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return round(font.getlength(text))


def _fit(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int) -> str:
    """The text, cut with an ellipsis to ``width`` px."""
    if _text_width(font, text) <= width:
        return text
    while text and _text_width(font, text + "...") > width:
        text = text[:-1]
    return text + "..."


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    factor = min(width / image.width, height / image.height)
    if factor >= 1.0:
        whole = int(factor)
        return image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)
