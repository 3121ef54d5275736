"""F32, F16 and BF16: one weight a block, little-endian."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...errors import OpError
from .base import BlockFormat


class _Float(BlockFormat):
    """A block is one float of ``dtype``; encoding rounds to the nearest, ties to even."""

    block_size = 1
    dtype: ClassVar[torch.dtype]

    def decode(self, blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(self.dtype))

    def encode(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        values = weights.to(self.dtype)
        overflow = int(values.isinf().sum())
        if overflow:
            raise OpError(
                f"{overflow} weights are too large for {self.name}",
                found=float(weights.abs().max()),
                needed=f"at most {torch.finfo(self.dtype).max:g}",
                hint="Store this tensor as F32.",
            )
        return values.view(torch.uint8)


class F32(_Float):
    name, ggml_type, type_size, dtype = "F32", 0, 4, torch.float32


class F16(_Float):
    name, ggml_type, type_size, dtype = "F16", 1, 2, torch.float16


class BF16(_Float):
    name, ggml_type, type_size, dtype = "BF16", 30, 2, torch.bfloat16
