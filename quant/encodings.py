"""How one tensor is stored: a class an encoding, each works on any number of rows.

Rows are independent in every encoding, so that a weight of any size is encoded and measured a few
rows at a time. ``encode`` and ``decode`` are exact inverses up to the quantization itself: what
``decode`` gives is what a reader of the file computes with, in fp32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.codecs import SMOOTH_INT8
from ..ops.blocks import FORMATS, dequantize, quantize
from ..ops.feedback import Feedback
from ..ops.gptq import ExactFeedback
from ..ops.layouts.int8 import int8_label
from ..ops.native.encode import Lost, encoder_for
from ..ops.reference import quantize_rows
from ..ops.rotation import rotate
from .input_moments import InputMoments

Shape = tuple[int, ...]


class Encoding(Protocol):
    """What the planner and the writers know of an encoding."""

    @property
    def label(self) -> str:
        """The type as reports show it."""

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Stored tensors by suffix, first dimension = rows."""

    def constants(self) -> dict[str, Tensor]:
        """Stored tensors that do not depend on the weight, by suffix."""

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> Encoding:
        """The same for a linear of these inputs: its outputs lose the least, not its weights.

        What all rows share is computed here; without ``feedback`` codes are rounded to nearest.
        """
        return self

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """fp32 rows -> their share of ``parts``."""

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        """A share of ``parts`` -> fp32 rows in original coordinates."""

    def encode_compiled(self, rows: Tensor) -> tuple[dict[str, Tensor], Lost] | None:
        """Rows of any float dtype -> what ``encode`` gives, and what ``decode`` then loses, in one
        pass; None where no compiled code does that, or the rows are to be refused."""
        return None


@dataclass(frozen=True)
class Unquantized(Encoding):
    """Stored as it is, in ``dtype``, under the suffix ``suffix`` (``weight``, ``bias``)."""

    dtype: torch.dtype = torch.bfloat16
    suffix: str = "weight"

    @property
    def label(self) -> str:
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[self.dtype]

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {self.suffix: (self.dtype, shape)}

    def constants(self) -> dict[str, Tensor]:
        return {}

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return {self.suffix: rows.to(self.dtype)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return parts[self.suffix].float()


@dataclass(frozen=True, eq=False)
class NativeInt8(Encoding):
    """``q = round(R(W * smooth) / scale)``, ``scale = absmax / 127`` a row: ComfyUI's container.

    ``weight`` int8 [N, K], ``weight_scale`` fp32 [N, 1], ``comfy_quant`` the JSON that stock
    ComfyUI reads, in its own spelling. R is ConvRot's rotation in groups of ``rotation``. With
    ``smooth`` fp32 [K], stored beside them, the format is one of our own name: the stock loader
    refuses it, where it would otherwise drop the vector and compute something else. ``dense`` asks
    readers for a 16-bit product, in the words of stock ComfyUI, which does not follow them for this
    format.
    """

    rotation: int | None = None
    smooth: Tensor | None = None
    feedback: Feedback | None = None
    dense: bool = False

    @property
    def label(self) -> str:
        return int8_label(self.rotation, smooth=self.smooth is not None, dense=self.dense)

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, (shape[0], 1))}

    def constants(self) -> dict[str, Tensor]:
        smoothed = self.smooth is not None
        config: dict[str, object] = {"format": SMOOTH_INT8 if smoothed else "int8_tensorwise"}
        if self.rotation is not None:
            config |= {"convrot": True, "convrot_groupsize": self.rotation}
        if self.dense:
            config["full_precision_matrix_mult"] = True
        text = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
        return {"comfy_quant": text} | ({"smooth": self.smooth.float()} if smoothed else {})

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> NativeInt8:
        return replace(self, feedback=follow(inputs, self.smooth, self.rotation, feedback))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        values = rows if self.smooth is None else rows * self.smooth.to(rows)
        values = values if self.rotation is None else rotate(values, self.rotation)
        q, scale = _int8_rows(values, self.feedback)
        return {"weight": q, "weight_scale": scale[:, None]}

    def encode_compiled(self, rows: Tensor) -> tuple[dict[str, Tensor], Lost] | None:
        encoder = encoder_for(rows)
        if encoder is None or self.smooth is not None or self.feedback is not None:
            return None
        found = encoder.int8_rows(rows, self.rotation)
        if found is None:
            return None
        q, scale, lost = found
        return {"weight": q, "weight_scale": scale[:, None]}, lost

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        values = parts["weight"].float() * parts["weight_scale"]
        values = values if self.rotation is None else rotate(values, self.rotation)
        return values if self.smooth is None else values / self.smooth.to(values)


@dataclass(frozen=True, eq=False)
class SmoothInt8(Encoding):
    """``q = round(W * smooth / scale)``: Transformer Lab's container.

    ``wq`` int8 [N, K], ``ws`` fp32 [N], ``smooth`` fp32 [K]: the reader divides the activations by
    it; without one the suffix is absent.
    """

    smooth: Tensor | None = None
    feedback: Feedback | None = None

    @property
    def label(self) -> str:
        return int8_label(None, smooth=self.smooth is not None)

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"wq": (torch.int8, shape), "ws": (torch.float32, shape[:1])}

    def constants(self) -> dict[str, Tensor]:
        return {} if self.smooth is None else {"smooth": self.smooth.float()}

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> SmoothInt8:
        return replace(self, feedback=follow(inputs, self.smooth, None, feedback))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        values = rows if self.smooth is None else rows * self.smooth.to(rows)
        q, scale = _int8_rows(values, self.feedback)
        return {"wq": q, "ws": scale}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        values = parts["wq"].float() * parts["ws"][:, None]
        return values if self.smooth is None else values / self.smooth.to(values)


@dataclass(frozen=True)
class Blocks(Encoding):
    """GGUF blocks of type ``qtype``, as bytes; F32 and BF16 are types like the others.

    ``importance`` fp32 [K], the mean square of each input, leads the search for scales.
    """

    qtype: str
    shape: Shape
    suffix: str = "weight"
    importance: Tensor | None = field(default=None, compare=False)
    feedback: Feedback | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return self.qtype

    @property
    def ggml_type(self) -> int:
        return FORMATS[self.qtype].ggml_type

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        form = FORMATS[self.qtype]
        row_bytes = shape[-1] // form.block_size * form.type_size
        return {self.suffix: (torch.uint8, (*shape[:-1], row_bytes))}

    def constants(self) -> dict[str, Tensor]:
        return {}

    def led_by(self, inputs: InputMoments, *, feedback: bool) -> Blocks:
        if not FORMATS[self.qtype].uses_importance:
            return self
        follow = inputs.damped().feedback() if feedback else None
        return replace(self, importance=inputs.square, feedback=follow)

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        blocks = quantize(rows, self.qtype, self.importance, feedback=self.feedback)
        return {self.suffix: blocks}

    def encode_compiled(self, rows: Tensor) -> tuple[dict[str, Tensor], Lost] | None:
        encoder = encoder_for(rows)
        if encoder is None or self.qtype != "Q8_0" or self.importance is not None:
            return None
        found = encoder.q8_0(rows)
        return None if found is None else ({self.suffix: found[0]}, found[1])

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        data = parts[self.suffix]
        return dequantize(data, self.qtype, (*data.shape[:-1], self.shape[-1]))


def follow(
    inputs: InputMoments,
    smooth: Tensor | None,
    rotation: int | None,
    wanted: bool,
    run: int = 1,
) -> Feedback | ExactFeedback | None:
    """The feedback of a weight whose inputs are divided by ``smooth`` and rotated."""
    if not wanted:
        return None
    inputs = inputs.damped()
    inputs = inputs if smooth is None else inputs.scaled(1 / smooth)
    return (inputs if rotation is None else inputs.rotated(rotation)).feedback(run)


def _int8_rows(values: Tensor, feedback: Feedback | None) -> tuple[Tensor, Tensor]:
    """``quantize_rows``, with the codes of ``feedback`` where it expects less error of a row."""
    q, scale = quantize_rows(values)
    if feedback is None:
        return q, scale
    codes, better = feedback.round(values, scale[:, None], None, (-127, 127))
    return torch.where(better[:, None], codes, q), scale


def stored_bytes(encoding: Encoding, shape: Shape) -> int:
    """Bytes of a tensor of ``shape`` in this encoding, constants included."""
    parts = encoding.parts(shape).values()
    variable = sum(dtype.itemsize * math.prod(size) for dtype, size in parts)
    return variable + sum(t.nbytes for t in encoding.constants().values())
