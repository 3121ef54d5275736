"""A contact sheet: rows and columns of pictures, labels that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _ALARM, _PAPER = (20, 20, 20), (110, 110, 110), (200, 0, 0), (255, 255, 255)
_GAP = 8
_TEXT, _SMALL = 22, 16
_LABEL_WIDTH = 250
_TITLE_LINES = 3
_MISSING = (228, 228, 230)
_CELL_SIDE = 256  # small pictures are enlarged by whole factors up to about this width
_MOST = 512  # larger ones are reduced to this width


@dataclass(frozen=True)
class Row:
    """A title, lines below it, a picture a column (None: a gap), a remark below each or "".

    Remarks are alarms, in red, unless ``calm``.
    """

    title: str
    lines: Sequence[str]
    pictures: Sequence[Image.Image | None]
    remarks: Sequence[str]
    calm: bool = False


def _cell_size(rows: Sequence[Row]) -> tuple[int, int]:
    sizes = (p.size for row in rows for p in row.pictures if p is not None)
    width, height = next(sizes, (_CELL_SIDE, _CELL_SIDE))
    if width > _MOST:
        return _MOST, round(height * _MOST / width)
    factor = max(1, _CELL_SIDE // width)
    return width * factor, height * factor


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    enlarged = picture.width <= size[0]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return picture.resize(size, method)


def _cut(draw: ImageDraw.ImageDraw, words: str, font, room: int) -> str:
    """``words`` on one line, as much of them as has room."""
    line = " ".join(words.split())
    if draw.textlength(line, font=font) <= room:
        return line
    while line and draw.textlength(f"{line}...", font=font) > room:
        line = line[:-1]
    return f"{line}..."


def _wrapped(draw: ImageDraw.ImageDraw, words: str, font, room: int) -> list[str]:
    """``words`` on up to _TITLE_LINES lines; what has no room is cut off the last one."""
    lines: list[str] = []
    left = words.split()
    while left and len(lines) < _TITLE_LINES - 1:
        count = 1
        while count < len(left) and draw.textlength(" ".join(left[: count + 1]), font) <= room:
            count += 1
        lines.append(_cut(draw, " ".join(left[:count]), font, room))
        left = left[count:]
    return [*lines, _cut(draw, " ".join(left), font, room)] if left else lines


def contact_sheet(rows: Sequence[Row], columns: Sequence[str]) -> Image.Image:
    """The sheet of ``rows`` under the ``columns``' titles; cells have the first picture's shape."""
    width, height = _cell_size(rows)
    title, text = ImageFont.load_default(_TEXT), ImageFont.load_default(_SMALL)
    line = _TEXT * 5 // 4
    foot = line if any(any(row.remarks) for row in rows) else 0
    room = _LABEL_WIDTH - _GAP
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    titles = [_wrapped(ruler, row.title, title, room) for row in rows]
    tallest = max(len(t) + len(row.lines) for t, row in zip(titles, rows, strict=True))
    step = max(height + foot, line * tallest) + _GAP
    left = [_GAP + _LABEL_WIDTH + i * (width + _GAP) for i in range(len(columns) + 1)]
    sheet = Image.new("RGB", (left[-1], line + 2 * _GAP + len(rows) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, name in zip(left, columns, strict=False):
        name = _cut(draw, name, title, width)
        draw.text((x + width // 2, _GAP + line // 2), name, fill=_INK, font=title, anchor="mm")
    for j, row in enumerate(rows):
        top = line + 2 * _GAP + j * step
        for k, words in enumerate(titles[j]):
            draw.text((_GAP, top + k * line), words, fill=_INK, font=title)
        for k, words in enumerate(row.lines, len(titles[j])):
            draw.text((_GAP, top + k * line), words, fill=_FAINT, font=text)
        for x, picture, remark in zip(left[:-1], row.pictures, row.remarks, strict=True):
            if picture is None:
                draw.rectangle((x, top, x + width - 1, top + height - 1), fill=_MISSING)
            else:
                sheet.paste(_fitted(picture, (width, height)), (x, top))
            middle = (x + width // 2, top + height + line // 2)
            ink = _FAINT if row.calm else _ALARM
            draw.text(middle, remark, fill=ink, font=text, anchor="mm")
    return sheet
