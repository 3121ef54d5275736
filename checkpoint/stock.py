"""Weights in the host's 4-, 6- and 8-bit containers: one class a format of ``comfy_quant``.

``asym_w4a8_int8`` (W4A8, W6A8), ``convrot_w4a4``, ``awq_w4a16`` (and ``microscaled``): the names of
tensors and of what the description says are those that ComfyUI 0.33 and comfy-kitchen 0.2.40 write.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OpError
from ..ops.layouts import awq_tensor, w4a4_tensor, w4a8_tensor
from ..ops.layouts.packed_tensors import check_form, check_rotation
from .codecs import Stored
from .files import TORCH_DTYPES
from .parts import Parts, same_vector

_BYTES = ("I8", "U8")
"""Packed codes are stored as either; ComfyUI takes one for the other, too."""


class StockStored(Stored):
    """Base: claimed by the format's name; ``WEIGHT`` is the dtype that the codes are stored in."""

    FORMAT: ClassVar[str]
    ALSO: ClassVar[tuple[str, ...]] = ()  # other names of the format
    LEVEL: ClassVar[str]
    WEIGHT: ClassVar[str]
    NEEDED: ClassVar[tuple[str, ...]]  # of ROLES, those that every such weight has
    SETTINGS: ClassVar[tuple[str, ...]] = ()  # what the description says beside the format
    PER_BYTE: ClassVar[int] = 2  # weights

    @classmethod
    def rotated(cls, parts: Parts) -> bool:
        return "convrot_groupsize" in cls.SETTINGS  # it says only in which groups

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return parts.quantization().get("format") in (cls.FORMAT, *cls.ALSO)

    @classmethod
    def level(cls, parts: Parts) -> str:
        weight = parts.weight
        taken = _BYTES if cls.WEIGHT in _BYTES else (cls.WEIGHT,)
        if weight.dtype not in taken or len(weight.shape) != 2:
            found = f"{weight.dtype} {list(weight.shape)}"
            raise parts.corrupt(
                f"codes of {cls.FORMAT} are a matrix", found, f"{cls.WEIGHT} [N, n]"
            )
        for role in cls.NEEDED:
            if role not in parts.roles:
                raise parts.corrupt(f"{cls.FORMAT} without its {role}", "none", f"weight_{role}")
        parts.check_format(cls.FORMAT, *cls.ALSO, keys=(*cls.SETTINGS, "orig_shape"))
        try:
            cls.check_beside(parts)
        except OpError as error:
            raise parts.corrupt(error.message, error.found, error.needed) from error
        told, shape = parts.setting("orig_shape", None), list(cls.shape(parts))
        if told not in (None, shape):
            raise parts.corrupt("comfy_quant says another orig_shape", str(told)[:40], shape)
        return cls.LEVEL

    @classmethod
    @abstractmethod
    def check_beside(cls, parts: Parts) -> None:
        """CheckpointError or OpError unless, by the headers, what is beside the codes fits them."""

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        rows, columns = parts.weight.shape
        return rows, columns * cls.PER_BYTE

    @staticmethod
    def check_dtype(parts: Parts, role: str, *names: str) -> None:
        """CorruptFileError unless ``role`` is of a dtype in ``names``, or of its bits in uint8."""
        raw = parts.roles[role]
        if raw.dtype not in (*names, "U8"):
            needed = " or ".join((*names, "U8"))
            raise parts.corrupt(f"{raw.key} has another dtype", raw.dtype, needed)

    @classmethod
    def read_codes(cls, parts: Parts) -> Tensor:
        """The weight's bytes as ``WEIGHT``."""
        return parts.weight.read().view(TORCH_DTYPES[cls.WEIGHT])

    @staticmethod
    def as_dtype(parts: Parts, role: str, name: str) -> Tensor:
        """The tensor of ``role``, stored as the dtype ``name`` or as the same bits in uint8."""
        return parts.roles[role].read().view(TORCH_DTYPES[name])


@dataclass(frozen=True)
class W4A8(StockStored):
    """``W = R(clamp(round(level * s_rel)) * s_channel + zeros)``: see ``ops.grouped``."""

    FORMAT = "asym_w4a8_int8"
    LEVEL = "W4A8"
    WEIGHT = "I8"
    ROLES = ("s_rel", "s_channel", "codebook", "zeros")
    NEEDED = ("s_rel", "s_channel")
    SETTINGS = ("group_size", "convrot_groupsize", "bits")

    codes: Tensor
    s_rel: Tensor
    s_channel: Tensor
    codebook: Tensor | None
    zeros: Tensor | None
    group: int
    rotation: int

    @classmethod
    def level(cls, parts: Parts) -> str:
        super().level(parts)
        return "W4A8" if cls.bits(parts) == 4 else "W6A8"

    @classmethod
    def check_beside(cls, parts: Parts) -> None:
        rows, columns = cls.shape(parts)
        bits, group = cls.bits(parts), integer(parts, "group_size", 16)
        if integer(parts, "bits", bits) != bits:
            found = parts.setting("bits", bits)
            raise parts.corrupt("comfy_quant says another number of bits", found, f"{bits}")
        plain = not {"codebook", "zeros"} & parts.roles.keys()
        check_form(columns, bits, group, integer(parts, "convrot_groupsize", 256), plain=plain)
        cls.check_dtype(parts, "s_rel", "F32", "F8_E4M3")
        sizes = {"s_channel": rows, "codebook": 16, "zeros": rows * columns // group}
        for role in sizes.keys() & parts.roles.keys():
            parts.check_vector(role, (sizes[role],))

    @classmethod
    def bits(cls, parts: Parts) -> int:
        """4 or 6, by the bytes of a row and the number of its groups."""
        stored, (rows, columns) = parts.roles["s_rel"].shape, parts.weight.shape
        group = integer(parts, "group_size", 16)
        width = stored[1] * group if len(stored) == 2 and stored[0] == rows else 0
        for bits in (4, 6):
            if width and columns * 8 == width * bits:
                return bits
        needed = f"[{rows}, K / {group}] for {columns} bytes of 4- or 6-bit codes"
        raise parts.corrupt("the group scales do not fit the codes", list(stored), needed)

    @classmethod
    def shape(cls, parts: Parts) -> tuple[int, ...]:
        rows, columns = parts.weight.shape
        return rows, columns * 8 // cls.bits(parts)

    @classmethod
    def read(cls, parts: Parts) -> W4A8:
        s_rel = parts.roles["s_rel"]
        read = s_rel.read() if s_rel.dtype == "F32" else cls.as_dtype(parts, "s_rel", "F8_E4M3")
        rows, columns = cls.shape(parts)
        group = integer(parts, "group_size", 16)
        zeros = None
        if "zeros" in parts.roles:
            zeros = parts.vector("zeros", (rows * columns // group,)).view(-1, rows)
        coded = "codebook" in parts.roles
        return cls(
            cls.read_codes(parts),
            read,
            parts.vector("s_channel", (rows,)),
            parts.vector("codebook", (16,)) if coded else None,
            zeros,
            group,
            integer(parts, "convrot_groupsize", 256),
        )

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return w4a8_tensor(
            self.codes,
            self.s_rel,
            self.s_channel,
            dtype=dtype,
            group_size=self.group,
            rotation=self.rotation,
            codebook=self.codebook,
            correction=self.zeros,
        )

    @classmethod
    def stack(cls, items: Sequence[W4A8]) -> W4A8 | None:
        first = items[0]
        for item in items[1:]:
            alike = (item.group, item.rotation, item.s_rel.dtype, item.codes.shape[1])
            ours = (first.group, first.rotation, first.s_rel.dtype, first.codes.shape[1])
            zeros = (item.zeros is None) == (first.zeros is None)
            if alike != ours or not zeros or not same_vector(item.codebook, first.codebook):
                return None
        return cls(
            torch.cat([item.codes for item in items]),
            torch.cat([item.s_rel.view(torch.uint8) for item in items]).view(first.s_rel.dtype),
            torch.cat([item.s_channel for item in items]),
            first.codebook,
            None if first.zeros is None else torch.cat([item.zeros for item in items], dim=1),
            first.group,
            first.rotation,
        )


@dataclass(frozen=True)
class W4A4(StockStored):
    """``W = R(code * scale)``: signed int4, a scale a row."""

    FORMAT = "convrot_w4a4"
    LEVEL = "INT4 W4A4"
    WEIGHT = "I8"
    ROLES = NEEDED = ("scale",)
    SETTINGS = ("convrot_groupsize", "linear_dtype", "quant_group_size")

    codes: Tensor
    scale: Tensor
    rotation: int
    linear_dtype: str

    @classmethod
    def check_beside(cls, parts: Parts) -> None:
        rows, columns = cls.shape(parts)
        wish = parts.setting("linear_dtype", "int4")
        if wish not in ("int4", "int8"):
            raise parts.unsupported(f"linear_dtype {wish!r}")
        parts.check_vector("scale", (rows,))
        check_rotation(integer(parts, "convrot_groupsize", 256), columns)

    @classmethod
    def read(cls, parts: Parts) -> W4A4:
        rows, wish = parts.weight.shape[0], parts.setting("linear_dtype", "int4")
        scale = parts.vector("scale", (rows,))
        return cls(cls.read_codes(parts), scale, integer(parts, "convrot_groupsize", 256), wish)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return w4a4_tensor(
            self.codes,
            self.scale,
            dtype=dtype,
            rotation=self.rotation,
            linear_dtype=self.linear_dtype,
        )

    @classmethod
    def stack(cls, items: Sequence[W4A4]) -> W4A4 | None:
        first = items[0]
        if len({(item.rotation, item.linear_dtype) for item in items}) > 1:
            return None
        codes = torch.cat([item.codes for item in items])
        scale = torch.cat([item.scale for item in items])
        return cls(codes, scale, first.rotation, first.linear_dtype)


@dataclass(frozen=True)
class AWQ(StockStored):
    """``W[n, k] = (code - 8) * scale[k // group, n] + zeros[k // group, n]``."""

    FORMAT = "awq_w4a16"
    LEVEL = "AWQ W4A16"
    WEIGHT = "I8"
    ROLES = NEEDED = ("scale", "zeros")
    SETTINGS = ("group_size",)

    codes: Tensor
    scale: Tensor
    zeros: Tensor

    @classmethod
    def check_beside(cls, parts: Parts) -> None:
        rows, columns = cls.shape(parts)
        stored = parts.roles["scale"].shape
        groups = stored[0] if len(stored) == 2 and stored[1] == rows else 0
        if not groups or columns % groups:
            needed = f"[a divisor of {columns}, {rows}]"
            raise parts.corrupt("scales of no groups", list(stored), needed)
        if integer(parts, "group_size", columns // groups) * groups != columns:
            found = f"{parts.setting('group_size', None)}, {groups} scales a row"
            raise parts.corrupt("comfy_quant says another group_size", found, columns // groups)
        for role in cls.NEEDED:
            raw = parts.check_vector(role, (groups * rows,))
            if tuple(raw.shape) != (groups, rows):
                needed = [groups, rows]
                raise parts.corrupt(f"{raw.key} does not fit", list(raw.shape), needed)

    @classmethod
    def read(cls, parts: Parts) -> AWQ:
        scale, zeros = (parts.matrix(role) for role in cls.NEEDED)
        return cls(cls.read_codes(parts), scale, zeros)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return awq_tensor(self.codes, self.scale, self.zeros, dtype=dtype)

    @classmethod
    def stack(cls, items: Sequence[AWQ]) -> AWQ | None:
        if len({(len(item.scale), item.codes.shape[1]) for item in items}) > 1:
            return None
        codes, scale, zeros = ([getattr(i, n) for i in items] for n in ("codes", "scale", "zeros"))
        return cls(torch.cat(codes), torch.cat(scale, dim=1), torch.cat(zeros, dim=1))


def integer(parts: Parts, name: str, default: int) -> int:
    """A whole number of the description, positive. Raises CorruptFileError for anything else."""
    value = parts.setting(name, default)
    if type(value) is not int or not 0 < value < 1 << 16:
        raise parts.corrupt(f"unusable {name} in comfy_quant", repr(value)[:40], "a whole number")
    return value
