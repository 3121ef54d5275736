"""GGUF blocks to floats on any device: one kernel where there is one, else the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, reference


def dequantize(
    data: Tensor,
    qtype: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str = dispatch.AUTO,
) -> Tensor:
    """Weights ``[*shape]`` of packed blocks in ``dtype``: see ``blocks.dequantize``.

    The same bits whatever ``backend`` decodes. Inside ``torch.compile`` the formula, which the
    compiler fuses by itself.
    """
    if data.device.type == "cpu" or torch.compiler.is_compiling():
        return reference.dequantize(data, qtype, shape, dtype)
    # a backend that multiplies without decoding is served by the best decoder
    decoder = dispatch.AUTO if backend in _NO_DECODER else backend
    run = dispatch.choose("dequantize", (1, 1, shape[-1]), data.device, decoder).get("dequantize")
    return run(data, qtype, shape, dtype)


_NO_DECODER = ("comfy_kitchen", "int_mm")
