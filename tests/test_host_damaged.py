"""A file whose headers are whole and whose values are not, in a real ComfyUI."""

from __future__ import annotations

import pytest

from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.runs import fails_with

pytestmark = pytest.mark.host


@pytest.mark.parametrize("copy", ["conditional", "unconditional"])
def test_a_black_picture_is_an_error_that_names_the_weight(server, models, copy):
    """Of a pair of two levels, the one that is damaged."""
    folder = models / "diffusion_models"
    names = {"conditional": graphs.CONDITIONAL, "unconditional": graphs.UNCONDITIONAL}
    path = folder / f"ideogram4_{copy}_damaged_Q4_0.gguf"
    quantize_checkpoint(folder / names[copy], "Q4_0", path)
    data = bytearray(path.read_bytes())
    data[-4096:] = b"\xff" * 4096  # NaN, as float16 scales and as floats
    path.write_bytes(data)
    names[copy] = path.name
    chosen = {f"{key}_file": name for key, name in names.items()}
    try:
        fails_with(server, graphs.with_sampler(**chosen), f"{copy} copy", "NaN", "download")
    finally:
        path.unlink()
