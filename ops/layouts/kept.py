"""Whether a weight that was changed and encoded again still holds the change.

Rounding to nearest adds the least error, but a change smaller than half a step is gone with it: 2 %
of a weight, as a LoRA of usual strength, at 4 bits. Rounding by chance keeps any change on average
and adds twice the error energy. So it is for changes that nearest loses.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor.base import QuantizedTensor, get_layout_class
from torch import Tensor

from ..chunks import row_chunks

KEPT = 0.95
"""Share of a change that encoding anew has to keep to be good enough."""


def keeps_change(stored: QuantizedTensor, wanted: Tensor, found: QuantizedTensor) -> bool:
    """Whether ``sum (found - stored) * (wanted - stored) >= KEPT * |wanted - stored|^2``.

    ``wanted`` float [N, K] is what ``stored`` was decoded to, in that dtype, and changed; ``found``
    is its encoding. Neither is transposed.
    """
    shape = tuple(wanted.shape)
    cut = get_layout_class(stored._layout_cls).can_slice_rows(stored._params)
    kept, energy = 0.0, 0.0
    for rows in row_chunks(shape, wanted.device) if cut else (slice(0, shape[0]),):
        before = _decoded(stored, rows, wanted.dtype)
        change = wanted[rows].float() - before
        kept += ((_decoded(found, rows, wanted.dtype) - before) * change).sum().item()
        energy += change.square().sum().item()
    return kept >= KEPT * energy


def _decoded(weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """float32 [rows, K], rounded to ``dtype``."""
    whole = rows == slice(0, weight.shape[0])
    part = weight if whole else weight.narrow(0, rows.start, rows.stop - rows.start)
    part = part.to(dtype=dtype)
    # rows that cut through a rotated group come dense
    return (part.dequantize() if isinstance(part, QuantizedTensor) else part).float()
