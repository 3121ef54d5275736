"""Changes of basis at a linear that neighbouring weights absorb.

A host that computes ``y' = W' x'`` on a folded file sees ``x' = R(x / smooth)`` and gives
``y' = P(y / rows)``: what makes x divides by ``smooth``, what reads y multiplies by ``rows``. R and
P are Hadamard rotations of ``ops.rotation``, each its own inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpError
from .rotation import check_order, rotate


@dataclass(frozen=True, eq=False)
class Fold:
    """``W' = P (W * smooth) R / rows`` of one linear ``W [N, K]``; None where nothing was done.

    ``smooth [K]`` and ``rows [N]`` are positive; ``rotation`` and ``row_rotation`` are groups. Rows
    are rotated from ``first_row`` on: in a fused qkv those of v alone.
    """

    smooth: Tensor | None = None
    rotation: int | None = None
    rows: Tensor | None = None
    row_rotation: int | None = None
    first_row: int = 0

    def fold(self, weight: Tensor) -> Tensor:
        """``W -> W'`` ``[N, K]`` in the dtype of ``weight`` (work in fp32 or fp64)."""
        out = weight if self.smooth is None else weight * self.smooth.to(weight)
        out = out if self.rotation is None else rotate(out, self.rotation)
        out = out if self.rows is None else out / self.rows.to(weight)[:, None]
        return self._turn_rows(out)

    def unfold(self, weight: Tensor) -> Tensor:
        """``W' -> W``, the inverse of :meth:`fold`."""
        out = self._turn_rows(weight)
        out = out if self.rows is None else out * self.rows.to(weight)[:, None]
        out = out if self.rotation is None else rotate(out, self.rotation)
        return out if self.smooth is None else out / self.smooth.to(weight)

    def fold_input(self, x: Tensor) -> Tensor:
        """``x -> R(x / smooth)``, ``[..., K]`` in the dtype of ``x``, rounded once."""
        if self.smooth is None:
            return x if self.rotation is None else rotate(x, self.rotation)
        out = x.to(_wide(x)) / self.smooth
        return (out if self.rotation is None else rotate(out, self.rotation)).to(x.dtype)

    def unfold_output(self, y: Tensor) -> Tensor:
        """``y' = P(y / rows) -> y``, ``[..., N]`` in the dtype of ``y``, rounded once."""
        out = y
        if self.row_rotation is not None:
            kept, turned = y[..., : self.first_row], y[..., self.first_row :].to(_wide(y))
            out = torch.cat((kept.to(turned), rotate(turned, self.row_rotation)), dim=-1)
        if self.rows is not None:
            out = out.to(_wide(y)) * self.rows
        return out.to(y.dtype)

    def fold_low_rank(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """An update ``up @ down`` of W as one of W': ``down [r, K]``, ``up [N, r]``, both fp32."""
        down, up = down.float(), up.float()
        inputs = Fold(self.smooth, self.rotation)
        outputs = Fold(rows=self.rows, row_rotation=self.row_rotation, first_row=self.first_row)
        return inputs.fold(down), outputs.fold(up)

    def check(self, shape: tuple[int, int]) -> None:
        """OpError unless this fits a weight of ``shape`` (N, K); looks at sizes, not at values."""
        n, k = shape
        for name, vector, size in (("smooth", self.smooth, k), ("rows", self.rows, n)):
            if vector is not None and (tuple(vector.shape) != (size,) or vector.dtype.is_complex):
                raise OpError(
                    f"the folded {name} do not fit the weight",
                    found=list(vector.shape),
                    needed=[size],
                )
        if self.rotation is not None:
            check_order(k, self.rotation)
        if self.row_rotation is not None:
            check_order(n - self.first_row, self.row_rotation)

    def _turn_rows(self, weight: Tensor) -> Tensor:
        if self.row_rotation is None:
            return weight
        turned = rotate(weight[self.first_row :].T.contiguous(), self.row_rotation).T
        return torch.cat((weight[: self.first_row], turned))


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32
