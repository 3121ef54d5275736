"""A contact sheet: one row a level, one column a prompt, labels that can be read."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_GAP = 8
_TEXT = 22
_LABEL_WIDTH = 250
_CELL_SIDE = 256  # pictures are enlarged by whole factors up to about this width


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[str], Sequence[Image.Image]]], columns: Sequence[str]
) -> Image.Image:
    """The sheet of ``rows`` (title, lines below it, pictures) under the ``columns``' titles.

    All pictures have one size; each row has a picture for every column.
    """
    width, height = rows[0][2][0].size
    factor = max(1, _CELL_SIDE // width)
    width, height = width * factor, height * factor
    title, text = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT * 3 // 4)
    line = _TEXT * 5 // 4
    row_height = max(height, line * (1 + max(len(lines) for _, lines, _ in rows))) + _GAP
    sheet = Image.new(
        "RGB",
        (
            _GAP + _LABEL_WIDTH + len(columns) * (width + _GAP),
            line + 2 * _GAP + len(rows) * row_height,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        middle = _GAP + _LABEL_WIDTH + i * (width + _GAP) + width // 2
        draw.text((middle, _GAP + line // 2), name, fill=_INK, font=title, anchor="mm")
    for j, (name, lines, pictures) in enumerate(rows):
        top = line + 2 * _GAP + j * row_height
        draw.text((_GAP, top), name, fill=_INK, font=title)
        for k, words in enumerate(lines):
            draw.text((_GAP, top + (k + 1) * line), words, fill=_FAINT, font=text)
        for i, picture in enumerate(pictures):
            place = (_GAP + _LABEL_WIDTH + i * (width + _GAP), top)
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
