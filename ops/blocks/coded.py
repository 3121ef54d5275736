"""Formats of codes on a grid of scales: what importance searches and error feedback rounds."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from ..chunks import FED_BACK, chunk_size, even
from ..codes import Codes
from ..feedback import Feedback
from .base import BlockFormat


class CodedFormat(BlockFormat):
    """A weight is ``step * code - shift``, step and shift those of its group in the block."""

    uses_importance = True
    code_limits: ClassVar[Codes]

    @abstractmethod
    def grid(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """(step, shift) float32 [n, groups] of ``blocks`` uint8 [n, type_size]."""

    @abstractmethod
    def recode(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """``blocks`` with other ``codes`` int8 [n, block_size], and the scales they have."""

    def feed_back(self, data: Tensor, weight: Tensor, feedback: Feedback) -> None:
        """Give rows [N, row bytes] the codes of ``feedback`` where it expects less error."""
        n, k = weight.shape
        rows = even(n, chunk_size(weight.device, FED_BACK) // max(k, 1))
        for start in range(0, n, rows):
            part, true = data[start : start + rows], weight[start : start + rows].float()
            recoded, better = self._round(part, true, feedback)
            worse = ~better  # few
            recoded[worse] = part[worse]
            part.copy_(recoded)

    def follow(self, data: Tensor, weight: Tensor, feedback: Feedback) -> Tensor:
        """Rows [N, row bytes] as ``data``, but for the codes: those of ``feedback`` throughout."""
        return self._round(data, weight, feedback)[0]

    def _round(self, data: Tensor, weight: Tensor, feedback: Feedback) -> tuple[Tensor, Tensor]:
        """Rows recoded, and whether less error is expected of each; see ``Feedback.round``."""
        blocks = data.reshape(-1, self.type_size)
        step, shift = (
            None if each is None else each.reshape(len(weight), -1) for each in self.grid(blocks)
        )
        codes, better = feedback.round(weight, step, shift, self.code_limits)
        return self.recode(blocks, codes.view(-1, self.block_size)).view(data.shape), better
