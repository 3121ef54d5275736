"""A contact sheet: one row a level, one column a prompt, labels that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _ALARM, _PAPER = (20, 20, 20), (110, 110, 110), (200, 0, 0), (255, 255, 255)
_GAP = 8
_TEXT, _SMALL = 22, 16
_LABEL_WIDTH = 250
_CELL_SIDE = 256  # pictures are enlarged by whole factors up to about this width


@dataclass(frozen=True)
class Row:
    """A title, lines below it, one picture a column, and a remark below each picture or ""."""

    title: str
    lines: Sequence[str]
    pictures: Sequence[Image.Image]
    remarks: Sequence[str]


def contact_sheet(rows: Sequence[Row], columns: Sequence[str]) -> Image.Image:
    """The sheet of ``rows`` under the ``columns``' titles; all pictures have one size."""
    width, height = rows[0].pictures[0].size
    factor = max(1, _CELL_SIDE // width)
    width, height = width * factor, height * factor
    title, text = ImageFont.load_default(_TEXT), ImageFont.load_default(_SMALL)
    line = _TEXT * 5 // 4
    foot = line if any(any(row.remarks) for row in rows) else 0
    step = max(height + foot, line * (1 + max(len(row.lines) for row in rows))) + _GAP
    left = [_GAP + _LABEL_WIDTH + i * (width + _GAP) for i in range(len(columns) + 1)]
    sheet = Image.new("RGB", (left[-1], line + 2 * _GAP + len(rows) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, name in zip(left, columns, strict=False):
        draw.text((x + width // 2, _GAP + line // 2), name, fill=_INK, font=title, anchor="mm")
    for j, row in enumerate(rows):
        top = line + 2 * _GAP + j * step
        draw.text((_GAP, top), row.title, fill=_INK, font=title)
        for k, words in enumerate(row.lines, 1):
            draw.text((_GAP, top + k * line), words, fill=_FAINT, font=text)
        for x, picture, remark in zip(left, row.pictures, row.remarks, strict=False):
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (x, top))
            middle = (x + width // 2, top + height + line // 2)
            draw.text(middle, remark, fill=_ALARM, font=text, anchor="mm")
    return sheet
