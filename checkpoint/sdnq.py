"""Weights of SDNQ (SD.Next's quantization): read exactly, and held in blocks that run here.

Beside ``weight`` lie ``scale`` and, for unsigned dtypes, ``zero_point``: one a row or one a group
of a row, ``[N, 1]`` or ``[N, groups, 1]``; a low-rank part may follow as ``svd_up``, ``svd_down``.
``W = R(table[code] * scale + zero_point + svd_up @ svd_down)``; what R is stands in the folder's
config (``sdnq_config``). Source: sdnq 0.2.8, ``dequantizer``.

``dense`` gives those values. A linear is held in a layout that runs here at its own speed: signed
integers of six to eight bits with one scale a row as INT8, exactly; those with groups, and all of
up to five bits, in blocks of GGUF with the same codes and scales rounded to float16 (60 to 70 dB);
every other kind is encoded anew, as Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OpError
from ..ops.blocks import from_codes
from ..ops.fold import Fold
from ..ops.layouts import folded_tensor, gguf_tensor, int8_tensor
from ..ops.rotation import is_group, is_order, rotate
from ..ops.sdnq import Number, number, unpack
from .anew import encoded_anew
from .codecs import Stored
from .parts import Parts
from .sdnq_config import SDNQ

EIGHT, FOUR = "SDNQ 8-bit", "SDNQ 4-bit"
"""Levels: dtypes of six bits or more, and those of fewer."""

_CODES = ("I8", "U8", "F8_E4M3", "F8_E5M2")
_BLOCK = 32
_INT8 = "INT8 W8A8"


@dataclass(frozen=True)
class Grid:
    """Codes int8 [N, K] of ``step * code + low``, a pair a group, and what holds them as they are:
    blocks of ``qtype``, or the INT8 layout."""

    qtype: str
    codes: Tensor
    step: Tensor
    low: Tensor | None

    def tensor(self, dtype: torch.dtype, rotation: int | None) -> Tensor:
        """The weight for a linear; of blocks, step and low are rounded to float16."""
        if self.qtype == _INT8:
            regular = rotation if rotation is not None and is_group(rotation) else None
            scale = self.step.reshape(-1).contiguous()
            held = int8_tensor(self.codes, scale, dtype=dtype, rotation=regular, validate=True)
            return held if rotation == regular else _turned_back(held, rotation)
        repeats = self.codes.shape[1] // self.step.shape[1] // _BLOCK
        step, low = (
            None if each is None else each.repeat_interleave(repeats, dim=1)
            for each in (self.step, self.low)
        )
        blocks = from_codes(self.codes, self.qtype, step, low)
        held = gguf_tensor(blocks, self.qtype, tuple(self.codes.shape), dtype=dtype)
        return _turned_back(held, rotation)

    @staticmethod
    def stack(grids: Sequence[Grid | None]) -> Grid | None:
        """All rows as one; None where they differ in type or groups, or one has no grid."""
        known = [grid for grid in grids if grid is not None]
        alike = {(grid.qtype, grid.step.shape[1]) for grid in known}
        if len(known) < len(grids) or len(alike) != 1:
            return None
        lows = [grid.low for grid in known if grid.low is not None]
        codes, steps = torch.cat([g.codes for g in known]), torch.cat([g.step for g in known])
        return Grid(known[0].qtype, codes, steps, torch.cat(lows) if lows else None)


@dataclass(frozen=True)
class Sdnq(Stored):
    """``values``: W rotated, fp32 [N, K]; ``grid``: its codes, where blocks can hold them."""

    ROLES = ("scale", "zero_point", "svd_up", "svd_down")
    values: Tensor
    rotation: int | None
    grid: Grid | None
    kind: str

    @classmethod
    def rotated(cls, parts: Parts) -> bool:
        return bool(parts.quantization().get("use_hadamard"))

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.quantization().get("format") == SDNQ

    @classmethod
    def level(cls, parts: Parts) -> str:
        said, kind = parts.quantization(), _number(parts)
        for key in ("use_codebook", "scale_dtype"):
            if said.get(key) not in (None, False, "none"):
                raise parts.unsupported(f"{_told(parts)} with {key} {str(said[key])[:40]}")
        if parts.weight.dtype not in _CODES:
            raise parts.corrupt("codes are bytes", parts.weight.dtype, " or ".join(_CODES))
        for role in ("scale", *(() if kind.signed else ("zero_point",))):
            if role not in parts.roles:
                raise parts.corrupt(f"{_told(parts)} without its {role}", "none", role)
        if ("svd_up" in parts.roles) != ("svd_down" in parts.roles):
            raise parts.corrupt("half a low-rank part", "one of them", "svd_up and svd_down")
        (rows, columns), groups = cls.shape(parts), _groups(parts)
        if groups < 1 or columns % groups:
            raise parts.corrupt("the groups do not divide a row", groups, f"a divisor of {columns}")
        for role in ("scale", *(("zero_point",) if "zero_point" in parts.roles else ())):
            parts.check_vector(role, (1, rows * groups))
        _rotation(parts, columns)
        if "svd_up" in parts.roles:
            _check_low_rank(parts, rows, columns)
        return EIGHT if kind.bits > 5 else FOUR

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        bits, weight, scale = _number(parts).bits, parts.weight, parts.roles["scale"].shape
        rows = scale[1] if _turned(parts) else scale[0] if len(scale) > 1 else 0
        if math.prod(scale) == 1 < weight.nbytes:  # one for all: the shape is in the weight alone
            if len(weight.shape) != 2 or bits < 8:
                raise parts.unsupported(f"{_told(parts)} with one scale for all")
            rows = weight.shape[0]
        columns, rest = divmod(weight.nbytes * 8, rows * bits) if rows else (0, 1)
        if rest or columns < 2:
            raise parts.corrupt(
                f"the codes do not fill whole rows of {_told(parts)}",
                f"{weight.nbytes} bytes, scales {list(scale)}",
                f"bytes of rows x {bits} bits",
            )
        return rows, columns

    @classmethod
    def read(cls, parts: Parts) -> Sdnq:
        kind, (rows, columns), groups = _number(parts), cls.shape(parts), _groups(parts)
        data = parts.weight.read()
        data = data.t().contiguous() if _turned(parts) else data
        step = _a_group(parts, "scale", rows, groups)
        low = _a_group(parts, "zero_point", rows, groups) if "zero_point" in parts.roles else None
        coded = data.dtype == torch.uint8
        numbers = kind.table[unpack(data, kind.bits).int()] if coded else data.float()
        numbers = numbers.view(rows, groups, columns // groups)
        scale = step[..., None]
        values = numbers * scale if low is None else torch.addcmul(low[..., None], numbers, scale)
        values = values.view(rows, columns)
        qtype = _holding(kind, columns // groups, groups)
        if "svd_up" in parts.roles:
            values, qtype = values + _low_rank(parts, rows, columns), None
        held = None
        if qtype is not None:
            codes = numbers.to(torch.int8).view(rows, columns)
            held = Grid(qtype, codes, step, low)
        return cls(values, _rotation(parts, columns), held, f"SDNQ's {kind.name}")

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """In a layout that this pack's kernels multiply, rotated as it is stored."""
        if self.grid is not None:
            return self.grid.tensor(dtype, self.rotation)
        return _turned_back(encoded_anew(self.values, dtype, self.kind), self.rotation)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """sdnq's own values, to fp32's rounding."""
        turned = self.values if self.rotation is None else rotate(self.values, self.rotation)
        return turned.to(dtype)

    @classmethod
    def stack(cls, items: Sequence[Sdnq]) -> Sdnq | None:
        """Of one rotation; pieces of several types, as *dynamic* files have them, share no grid."""
        if len({item.rotation for item in items}) > 1:
            return None
        values = torch.cat([item.values for item in items])
        kinds = " and ".join(dict.fromkeys(item.kind for item in items))
        return cls(values, items[0].rotation, Grid.stack([item.grid for item in items]), kinds)

    @classmethod
    def joined_level(cls, levels: Collection[str]) -> str:
        return EIGHT


def _told(parts: Parts) -> str:
    said = parts.quantization()
    return f"SDNQ {str(said.get('weights_dtype'))[:40]} (sdnq {str(said.get('version'))[:20]})"


def _number(parts: Parts) -> Number:
    try:
        return number(str(parts.quantization().get("weights_dtype")))
    except OpError as error:
        raise parts.unsupported(_told(parts)) from error


def _turned(parts: Parts) -> bool:
    """Whether the weight is stored [K, N], as it is where sdnq was asked for quantized products."""
    scale, weight = parts.roles["scale"].shape, parts.weight.shape
    return len(scale) == 2 and scale[0] == 1 < scale[1] and weight[-1:] == scale[1:]


def _groups(parts: Parts) -> int:
    """Scales a row."""
    shape = parts.roles["scale"].shape
    return shape[1] if len(shape) == 3 else 1


def _a_group(parts: Parts, role: str, rows: int, groups: int) -> Tensor:
    """fp32 [N, groups] of ``role``, which may be one for all."""
    values = parts.vector(role, (1, rows * groups))
    return values.expand(rows * groups).view(rows, groups)


def _rotation(parts: Parts, columns: int) -> int | None:
    """The group that rows were rotated in: the largest power of 2 that is asked for and fits."""
    said = parts.quantization()
    if not said.get("use_hadamard"):
        return None
    asked = said.get("hadamard_group_size")
    if type(asked) is not int or asked < 1:
        raise parts.corrupt("unusable hadamard_group_size", repr(asked)[:40], "a whole number")
    group = 1 << (min(asked, columns) - 1).bit_length()
    while columns % group:
        group //= 2
    if group < 4:
        return None
    if not is_order(group):
        raise parts.unsupported(f"{_told(parts)} rotated in groups of {group}")
    return group


def _low_rank(parts: Parts, rows: int, columns: int) -> Tensor:
    up, down = parts.matrix("svd_up"), parts.matrix("svd_down")
    up = up.t() if up.shape[0] != rows else up
    return up @ (down.t() if down.shape[-1] != columns else down)


def _check_low_rank(parts: Parts, rows: int, columns: int) -> None:
    """CorruptFileError unless both halves, each either way round, are one product [N, K]."""
    up, down = (tuple(parts.roles[role].shape) for role in ("svd_up", "svd_down"))
    for role, shape in (("svd_up", up), ("svd_down", down)):
        parts.check_vector(role, (math.prod(shape),))
    turned = (
        up if up[:1] == (rows,) else up[::-1],
        down if down[-1:] == (columns,) else down[::-1],
    )
    ranks = {turned[0][-1:], turned[1][:1]}
    matrices = len(up) == len(down) == 2
    if not matrices or len(ranks) > 1 or (turned[0][0], turned[1][1]) != (rows, columns):
        found = f"{list(up)} and {list(down)}"
        raise parts.corrupt("the low-rank part does not fit", found, f"[{rows}, r], [r, {columns}]")


def _turned_back(held: Tensor, rotation: int | None) -> Tensor:
    return held if rotation is None else folded_tensor(held, Fold(rotation=rotation))


def _holding(kind: Number, group: int, groups: int) -> str | None:
    """What holds such codes as they are, with a scale for every ``group`` values of a row."""
    if kind.integer and kind.signed and kind.bits > 5 and groups == 1:
        return _INT8
    if not kind.integer or group % _BLOCK:
        return None
    if kind.signed:
        return "Q8_0" if kind.bits > 5 else "Q5_0" if kind.bits == 5 else "Q4_0"
    return None if kind.bits > 5 else "Q5_1" if kind.bits == 5 else "Q4_1"
