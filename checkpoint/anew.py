"""Weights of formats that no layout here multiplies, encoded anew into one that runs."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..ops.blocks import quantize
from ..ops.layouts import gguf_tensor

logger = logging.getLogger(__name__)

_QTYPE = "Q8_0"


def encoded_anew(values: Tensor, dtype: torch.dtype, kind: str) -> Tensor:
    """``values`` fp32 [N, K] as Q8_0; one warning for every ``kind``, the format they come from."""
    _say(kind)
    blocks = quantize(values, _QTYPE)
    return gguf_tensor(blocks, _QTYPE, tuple(values.shape), dtype=dtype)


@functools.cache
def _say(kind: str) -> None:
    logger.warning(
        "weights of %s: no layout here multiplies such codes, so they are held as %s (8.5 bits), "
        "which takes the memory of that and adds its rounding",
        kind,
        _QTYPE,
    )
