"""Reading words out of pictures with rapidocr and the models that its wheel ships."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SHORT_SIDE = 256


def _enlarge(image: Image.Image) -> np.ndarray:
    """RGB with a short side of at least 256 px and a rim of the edge's own pixels."""
    rgb = image.convert("RGB")
    factor = max(1.0, _SHORT_SIDE / min(rgb.size))
    size = tuple(round(side * factor) for side in rgb.size)
    pixels = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC))
    rim = _SHORT_SIDE // 8
    return np.pad(pixels, ((rim, rim), (rim, rim), (0, 0)), mode="edge")


class WordReader:
    """rapidocr's detector and recogniser on the CPU, in `threads` threads."""

    def __init__(self, threads: int = 1):
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "Reading words needs rapidocr and onnxruntime: pip install rapidocr onnxruntime"
            ) from error
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Det.limit_side_len": _SHORT_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image.Image) -> str:
        """All text in the picture, in reading order, the boxes joined by spaces; "" if none."""
        found = self._engine(_enlarge(image)[..., ::-1])
        return " ".join(found.txts or ())

    def read_all(self, images: Sequence[Image.Image]) -> list[str]:
        """`read` for each picture."""
        return [self.read(image) for image in images]
