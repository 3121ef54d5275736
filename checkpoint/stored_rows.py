"""A stored matrix whose rows are read when they are asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .files import TORCH_DTYPES, RawTensor


class StoredRows:
    """Floats [N, K] of a file, in the dtype they are stored in: ``stored[rows]`` reads these rows.

    For who goes through a matrix once, a few rows at a time: nothing of it is held, and threads may
    read side by side. Not a map into the file: a file that is cut or changed meanwhile is a
    CheckpointError of the read, as :meth:`SourceFile.read` says, and not the end of the process.
    """

    ndim = 2

    def __init__(self, raw: RawTensor) -> None:
        self._raw = raw
        self.shape: tuple[int, ...] = tuple(raw.shape)
        self.dtype = TORCH_DTYPES[raw.dtype]

    @staticmethod
    def fits(raw: RawTensor) -> bool:
        """Whether ``raw`` is a matrix of plain floats with something in it."""
        dtype = TORCH_DTYPES.get(raw.dtype)
        plain = dtype in (torch.float32, torch.float16, torch.bfloat16)
        return plain and len(raw.shape) == 2 and math.prod(raw.shape) > 0

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows ``start : stop`` [n, K]; no other steps."""
        start, stop, _ = rows.indices(self.shape[0])
        row = self.shape[1] * self.dtype.itemsize
        data = self._raw.file.read(
            self._raw.offset + start * row, max(0, stop - start) * row, self.dtype.itemsize
        )
        return data.view(self.dtype).view(-1, self.shape[1])
