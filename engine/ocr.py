"""Reading words out of pictures with rapidocr and the models that its wheel ships."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SHORT_SIDE = 256


def _enlarge(image: Image.Image, short_side: int) -> np.ndarray:
    """RGB with a short side of at least ``short_side`` px and a rim of the edge's own pixels."""
    rgb = image.convert("RGB")
    factor = max(1.0, short_side / min(rgb.size))
    size = tuple(round(side * factor) for side in rgb.size)
    pixels = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC))
    rim = short_side // 8
    return np.pad(pixels, ((rim, rim), (rim, rim), (0, 0)), mode="edge")


class WordReader:
    """rapidocr's detector and recogniser on the CPU, in `threads` threads.

    Pictures are enlarged to at least `short_side` px: a smaller one is read faster.
    """

    def __init__(self, threads: int = 1, short_side: int = _SHORT_SIDE):
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "Reading words needs rapidocr and onnxruntime: pip install rapidocr onnxruntime"
            ) from error
        self._short_side = short_side
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Det.limit_side_len": short_side,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image.Image) -> str:
        """All text in the picture, in reading order, the boxes joined by spaces; "" if none."""
        found = self._engine(_enlarge(image, self._short_side)[..., ::-1])
        return " ".join(found.txts or ())

    def read_all(self, images: Sequence[Image.Image]) -> list[str]:
        """`read` for each picture."""
        return [self.read(image) for image in images]
