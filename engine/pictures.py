"""Reading pictures that others have made."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from ..errors import Ideogram4QuantError


class PictureError(Ideogram4QuantError, ValueError):
    """A picture that cannot be read."""


def read_picture(file: Path, *, hint: str | None = None) -> Image.Image:
    """The whole picture in RGB; PictureError, naming the file, for a damaged one or another file.

    ``hint`` says what to do about it.
    """
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    # what Pillow raises for damaged files, by format and place of the damage
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise PictureError(f"cannot be read as a picture: {error}", file=file, hint=hint) from error
