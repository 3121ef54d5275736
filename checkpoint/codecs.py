"""How a weight is stored: one class a format, from raw tensors to a tensor of torch.

A class sees the stored tensors of one weight by their role (``weight``, ``scale``, ``smooth``, ...;
see ``grammar``). ``claims`` and ``level`` look at headers; ``shape`` too, but for NF4, whose shape
is inside a small tensor. ``read`` brings the data in and returns an instance, which knows how to be
a weight: ``tensor`` (quantized if the format is), ``dense``, and ``stack`` (rows of several weights
as one, for q, k, v stored apart).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.blocks import FORMATS, dequantize
from ..ops.fold import Fold
from ..ops.layouts import folded_tensor, gguf_tensor, int8_tensor
from .files import BLOCK_TYPES
from .parts import DENSE_PRODUCT, Parts, same_vector

SMOOTH_INT8 = "ideogram4_quant_int8"
"""Format name, in ``comfy_quant``, of int8 weights that need their smoothing vector."""

FOLDED_INT8 = "ideogram4_quant_folded_int8"
ROW_FP8 = "ideogram4_quant_fp8"
"""Format names of weights that the host saved: int8 of a folded file, fp8 with a scale a row."""

_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(ABC):
    """The data of one weight in the form of its file.

    ``ROLES``: what it uses beside the weight itself and ComfyUI's description; a weight with more
    is of another format, whatever its dtype. ``level`` checks the description.
    """

    ROLES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def rotated(cls, parts: Parts) -> bool:
        """Whether the weight is stored rotated, and :meth:`read` undoes it."""
        return False

    @classmethod
    @abstractmethod
    def claims(cls, parts: Parts) -> bool:
        """Whether ``parts`` is of this format."""

    @classmethod
    @abstractmethod
    def level(cls, parts: Parts) -> str:
        """The level's name. Raises CheckpointError if the pack does not read this variant."""

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        """The weight's shape, [out, in] for a linear."""
        return parts.weight.shape

    @classmethod
    @abstractmethod
    def read(cls, parts: Parts) -> Stored:
        """Read the data. Raises CorruptFileError if the parts do not fit each other."""

    @abstractmethod
    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The weight for a linear; a QuantizedTensor, ``dtype`` when dequantized, if it can be."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight's true values, rounded to ``dtype`` once."""
        return self.tensor(dtype).dequantize()

    def unfolded(self, fold: Fold, dtype: torch.dtype) -> Tensor:
        """As :meth:`tensor`, for a linear of a folded file: W of the ``W'`` that is stored.

        OpError for a format that is not written folded.
        """
        return folded_tensor(self.tensor(dtype), fold)

    @classmethod
    def stack(cls, items: Sequence[Stored]) -> Stored | None:
        """All rows of ``items``, all of this class, as one weight; None if no such form exists."""
        return None

    @classmethod
    def joined_level(cls, levels: Collection[str]) -> str:
        """The level of rows of several ``levels``, all of this class; ``BF16`` if they are joined
        as floats.
        """
        return "BF16"


@dataclass(frozen=True)
class Unquantized(Stored):
    """Floats as they are. A description beside them belongs to another form of the weight."""

    data: Tensor

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.weight.dtype in _FLOATS

    @classmethod
    def level(cls, parts: Parts) -> str:
        parts.check_format()
        return "BF16"

    @classmethod
    def read(cls, parts: Parts) -> Unquantized:
        return cls(parts.weight.read())

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return self.data.to(dtype)

    dense = tensor

    def unfolded(self, fold: Fold, dtype: torch.dtype) -> Tensor:
        return fold.unfold(self.data.float()).to(dtype)

    @classmethod
    def stack(cls, items: Sequence[Unquantized]) -> Unquantized | None:
        if len({item.data.dtype for item in items}) > 1:
            return None
        return cls(torch.cat([item.data for item in items]))


@dataclass(frozen=True)
class Int8(Stored):
    """``W = unrotate(q * scale) / smooth``: q int8 [N, K], scale fp32 [N], smooth fp32 [K]."""

    ROLES = ("scale", "smooth", "pre_quant_scale")
    data: Tensor
    scale: Tensor
    smooth: Tensor | None
    rotation: int | None
    wants_dense: bool = False

    @classmethod
    def rotated(cls, parts: Parts) -> bool:
        return parts.rotation() is not None

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.weight.dtype == "I8"

    @classmethod
    def level(cls, parts: Parts) -> str:
        if len(parts.weight.shape) != 2:
            raise parts.corrupt("an int8 weight is a matrix", list(parts.weight.shape), "[N, K]")
        known = ["int8_tensorwise", SMOOTH_INT8, FOLDED_INT8]
        keys = ["convrot", "convrot_groupsize"]
        if parts.quantization().get("format") == FOLDED_INT8:
            keys.append("fold")
        if "scale" in parts.roles and math.prod(parts.roles["scale"].shape) == 1:
            known.append("int8_blockwise")  # of one block
            keys.append("group_size")
        parts.check_format(*known, keys=keys)
        if "scale" not in parts.roles:
            raise parts.corrupt("int8 without a scale", "no scale", "weight_scale or ws")
        parts.check_scale()
        parts.check_vector("scale", (1, parts.weight.shape[0]))
        if {"smooth", "pre_quant_scale"} <= parts.roles.keys():
            raise parts.unsupported("smoothing that is told twice")
        for role in {"smooth", "pre_quant_scale"} & parts.roles.keys():
            parts.check_vector(role, (parts.weight.shape[1],))
        if parts.quantization().get("format") == SMOOTH_INT8 and "smooth" not in parts.roles:
            raise parts.corrupt("a smoothed weight without its vector", "no smooth", "smooth")
        return "INT8 W8A8 rotated" if parts.rotation() else "INT8 W8A8"

    @classmethod
    def read(cls, parts: Parts) -> Int8:
        rows = parts.weight.shape[0]
        scale = parts.scale(rows).expand(rows).contiguous()
        wish = parts.setting(DENSE_PRODUCT, False) is True
        return cls(parts.weight.read(), scale, parts.smooth(), parts.rotation(), wish)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return int8_tensor(
            self.data,
            self.scale,
            dtype=dtype,
            smooth=self.smooth,
            rotation=self.rotation,
            dense=self.wants_dense,
            validate=True,
        )

    def unfolded(self, fold: Fold, dtype: torch.dtype) -> Tensor:
        """The fold as the smoothing, rotation and scales of the layout, where it has these."""
        if self.smooth is not None or None not in (self.rotation, fold.rotation):
            return super().unfolded(fold, dtype)
        absorbed = fold.row_rotation is None and fold.rows is not None
        own = int8_tensor(
            self.data,
            self.scale * fold.rows if absorbed else self.scale,
            dtype=dtype,
            smooth=fold.smooth,
            rotation=self.rotation or fold.rotation,
            dense=self.wants_dense,
            validate=True,
        )
        if fold.row_rotation is None:
            return own
        outputs = dataclasses.replace(fold, smooth=None, rotation=None)
        return folded_tensor(own, outputs)

    @classmethod
    def stack(cls, items: Sequence[Int8]) -> Int8 | None:
        first = items[0]
        for item in items[1:]:
            alike = (item.rotation, item.wants_dense) == (first.rotation, first.wants_dense)
            if not alike or not same_vector(item.smooth, first.smooth):
                return None
        data = torch.cat([item.data for item in items])
        scale = torch.cat([item.scale for item in items])
        return dataclasses.replace(first, data=data, scale=scale)


@dataclass(frozen=True)
class Blocks(Stored):
    """Blocks of GGUF: uint8 [..., bytes of a row]."""

    data: Tensor
    qtype: str
    weight_shape: tuple[int, ...]

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.weight.dtype in BLOCK_TYPES

    @classmethod
    def level(cls, parts: Parts) -> str:
        parts.check_format()
        qtype = parts.weight.dtype
        if qtype not in FORMATS:
            readable = ", ".join(name for name in FORMATS if name in BLOCK_TYPES)
            raise parts.unsupported(qtype, f"Use a file of {readable}.")
        return qtype

    @classmethod
    def read(cls, parts: Parts) -> Blocks:
        return cls(parts.weight.read(), cls.level(parts), parts.weight.shape)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return gguf_tensor(self.data, self.qtype, self.weight_shape, dtype=dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.data, self.qtype, self.weight_shape, dtype)

    @classmethod
    def stack(cls, items: Sequence[Blocks]) -> Blocks | None:
        if len({item.qtype for item in items}) > 1:
            return None
        rows = sum(item.weight_shape[0] for item in items)
        shape = (rows, *items[0].weight_shape[1:])
        return cls(torch.cat([item.data for item in items]), items[0].qtype, shape)
