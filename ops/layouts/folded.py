"""Weights of a folded file as linears of the original model.

``F.linear(x, w)``, ``dequantize()``, patches and row slices are all in original coordinates, so
nothing around such a weight has to know of it; the change of basis is made inside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ...errors import OpError
from ..fold import Fold
from ..linear import LinearOptions
from .base import BaseParams, Layout, check_same_device
from .gguf import GGUFLayout
from .int8 import Int8Layout
from .weight import Weight, derived

_PREFIX = "fold_"
_FIELDS = tuple(field.name for field in dataclasses.fields(Fold))


@dataclass(frozen=True, eq=False, kw_only=True)
class FoldParams(BaseParams):
    """The fields of ``ops.fold.Fold``, flat: comfy-kitchen moves tensors by field name."""

    fold_smooth: Tensor | None = None
    fold_rotation: int | None = None
    fold_rows: Tensor | None = None
    fold_row_rotation: int | None = None
    fold_first_row: int = 0


class FoldedLayout(Layout):
    """``W = fold.unfold(BASE.dequantize(qdata))``: the storage is ``W'`` in the layout ``BASE``."""

    BASE: type[Layout]
    FORMAT: str

    @classmethod
    def quantize(cls, tensor: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        """``BASE.quantize(fold.fold(tensor))``: ``fold_*`` options are the fold, others BASE's."""
        fold = Fold(**{f: options.pop(_PREFIX + f) for f in _FIELDS if _PREFIX + f in options})
        fold.check(tuple(tensor.shape))
        fold = _on(fold, tensor.device)
        qdata, params = cls.BASE.quantize(fold.fold(tensor.float()), *args, **options)
        return qdata, cls.wrap(params, fold, orig_dtype=tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The weight in original coordinates, in ``orig_dtype``."""
        wide = dataclasses.replace(params, orig_dtype=torch.float32)
        return fold_of(params).unfold(cls.BASE.dequantize(qdata, wide)).to(params.orig_dtype)

    @classmethod
    def description(cls, params: Any) -> dict[str, Any]:
        """BASE's under a name of its own, and the fold but for its vectors."""
        names = ("rotation", "row_rotation", "first_row")
        fold = {name: getattr(params, _PREFIX + name) for name in names}
        return {**cls.BASE.description(params), "format": cls.FORMAT, "fold": fold}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Keep the fold, and what BASE keeps, when a patched weight is quantized again."""
        own = {_PREFIX + name: getattr(qtensor._params, _PREFIX + name) for name in _FIELDS}
        return {**cls.BASE.requantize_kwargs(qtensor), **own}

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """``x @ W.T + bias``: x into the folded basis, the product in BASE, y out of it."""
        fold = fold_of(weight._params)
        y = cls.BASE.linear(fold.fold_input(x), weight, None, options)
        y = fold.unfold_output(y)
        return y if bias is None else y + bias.to(y.dtype)

    @classmethod
    def input_recipe(
        cls, weight: QuantizedTensor, tokens: int, dtype: torch.dtype, options: LinearOptions
    ) -> tuple[Tensor | None, int | None] | None:
        """BASE's where the fold leaves the input alone; None where it changes it."""
        fold = fold_of(weight._params)
        if fold.smooth is not None or fold.rotation is not None:
            return None
        return cls.BASE.input_recipe(weight, tokens, dtype, options)

    @classmethod
    def multiply_rows(
        cls,
        q: Tensor,
        scale: Tensor,
        weight: QuantizedTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        options: LinearOptions,
    ) -> Tensor:
        """BASE's product, and y out of the folded basis."""
        y = cls.BASE.multiply_rows(q, scale, weight, None, dtype, options)
        y = fold_of(weight._params).unfold_output(y)
        return y if bias is None else y + bias.to(y.dtype)

    @classmethod
    def can_slice_rows(cls, params: Any) -> bool:
        """As BASE; rotated rows come off in whole groups, see :meth:`slice_rows`."""
        return cls.BASE.can_slice_rows(params)

    @classmethod
    def slice_rows(cls, qtensor: QuantizedTensor, rows: slice) -> Any:
        """Rows ``rows``: quantized where they do not cut through a rotated group, else dense."""
        params = qtensor._params
        group, first = params.fold_row_rotation, params.fold_first_row
        start, stop, step = rows.indices(params.matrix_shape[0])
        whole = super().slice_rows(qtensor, rows)
        if group is None:
            return whole
        turned = range(max(start, first) - first, max(stop, first) - first)
        if turned and (step != 1 or turned.start % group or turned.stop % group):
            dense = qtensor.dequantize()
            return dense[:, rows] if params.transposed else dense[rows]
        changed = dataclasses.replace(
            whole._params,
            fold_row_rotation=group if turned else None,
            fold_first_row=max(first - start, 0) if turned else 0,
        )
        return derived(qtensor, whole._qdata, changed)

    @classmethod
    def wrap(cls, params: Any, fold: Fold, **changes: Any) -> Any:
        """BASE's parameters and a fold as parameters of this layout."""
        fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        own = {_PREFIX + name: getattr(fold, name) for name in _FIELDS}
        return cls.Params(**{**fields, **own, **changes})


class FoldedInt8Layout(FoldedLayout):
    """INT8 of a folded weight."""

    NAME = "Ideogram4QuantFoldedInt8"
    BASE = Int8Layout
    FORMAT = "ideogram4_quant_folded_int8"
    ROW_FIELDS = (*Int8Layout.ROW_FIELDS, "fold_rows")

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(FoldParams, Int8Layout.Params):
        """Int8Layout's, of ``W'``, and the fold."""

    @classmethod
    def linear(
        cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, options: LinearOptions
    ) -> Tensor:
        """As the others; a product that is wanted dense is one in original coordinates."""
        way = super(FoldedLayout, cls) if options.int8_dense(weight._params.dense) else super()
        return way.linear(x, weight, bias, options)


class FoldedGGUFLayout(FoldedLayout):
    """GGUF blocks of a folded weight."""

    NAME = "Ideogram4QuantFoldedGGUF"
    KEEPS_CHANGES = True
    BASE = GGUFLayout
    FORMAT = "ideogram4_quant_folded_gguf"
    ROW_FIELDS = (*GGUFLayout.ROW_FIELDS, "fold_rows")

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Params(FoldParams, GGUFLayout.Params):
        """GGUFLayout's, of ``W'``, and the fold."""


_FOLDED: dict[str, type[FoldedLayout]] = {
    layout.BASE.NAME: layout for layout in (FoldedInt8Layout, FoldedGGUFLayout)
}


def folded_tensor(weight: QuantizedTensor, fold: Fold) -> QuantizedTensor:
    """``W' = weight`` with the fold that made it -> W in original coordinates, same storage.

    Raises OpError for a layout that cannot be folded and a fold of another size.
    """
    layout = _FOLDED.get(weight._layout_cls)
    if layout is None:
        raise OpError(
            "a weight of this layout cannot be folded",
            found=weight._layout_cls,
            needed=" or ".join(_FOLDED),
        )
    fold.check(weight._params.matrix_shape)
    check_same_device(weight._qdata, smooth=fold.smooth, rows=fold.rows)
    fold = _on(fold, weight._qdata.device)
    return Weight(weight._qdata, layout.NAME, layout.wrap(weight._params, fold))


def fold_of(params: Any) -> Fold:
    """The fold in a folded layout's parameters."""
    return Fold(**{name: getattr(params, _PREFIX + name) for name in _FIELDS})


def _on(fold: Fold, device: torch.device) -> Fold:
    """The same with fp32 vectors on ``device``."""
    vectors = {
        name: vector.to(device, torch.float32).contiguous()
        for name in ("smooth", "rows")
        if (vector := getattr(fold, name)) is not None
    }
    return dataclasses.replace(fold, **vectors)
