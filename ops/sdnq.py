"""SDNQ's numbers: codes of two to eight bits, what each stands for, and how they lie in bytes.

A dtype is written as SDNQ writes it: ``uint4``, ``int8``, ``float4_e2m1fn`` (sign, exponent,
mantissa), ``float5_e2m3fnu`` (no sign). Every one is a table of at most 256 numbers, so that a
weight is ``table[code] * scale (+ zero)``; unsigned ones have a zero. Format as written by sdnq
0.2.8; its dtypes of one bit and of more than eight are not here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import OpError

_NAME = re.compile(
    r"(?P<integer>u?int)(?P<bits>[2-8])|(?P<short>u?fp)(?P<of>[2-8])"
    r"|float(?P<width>[2-8])_e(?P<exponent>[1-5])m(?P<mantissa>[0-7])fn(?P<unsigned>u?)(?:_sdnq)?"
)

# How codes of a width share bytes: a few codes in a few bytes, by pieces of bits:
# (code, byte, first bit in the byte, bits, first bit in the code).
_Piece = tuple[int, int, int, int, int]


def _whole(codes: int, first_byte: int, at: int, bits: int) -> tuple[_Piece, ...]:
    """The low ``bits`` of ``codes`` codes, each in a byte of its own."""
    return tuple((first_byte + i, i, at, bits, 0) for i in range(codes))


_PIECES: dict[int, tuple[_Piece, ...]] = {
    2: tuple((i, 0, 2 * i, 2, 0) for i in range(4)),
    3: (
        *(*_whole(3, 0, 0, 3), *_whole(3, 3, 3, 3)),
        *((6, 0, 6, 2, 0), (7, 1, 6, 2, 0), (6, 2, 6, 1, 2), (7, 2, 7, 1, 2)),
    ),
    4: ((0, 0, 0, 4, 0), (1, 0, 4, 4, 0)),
    5: (
        *(*_whole(5, 0, 0, 5), *_whole(3, 5, 5, 3)),
        *((5, 3, 5, 2, 3), (6, 4, 5, 2, 3), (7, 3, 7, 1, 4), (7, 4, 7, 1, 3)),
    ),
    6: (*_whole(3, 0, 0, 6), (3, 0, 6, 2, 4), (3, 1, 6, 2, 2), (3, 2, 6, 2, 0)),
    7: (*_whole(7, 0, 0, 7), *((7, i, 7, 1, 6 - i) for i in range(7))),
    8: ((0, 0, 0, 8, 0),),
}


@dataclass(frozen=True)
class Number:
    """One dtype of SDNQ: ``bits`` a code; ``integer`` or, if not, ``exponent`` and ``mantissa``."""

    name: str
    bits: int
    signed: bool
    integer: bool
    exponent: int = 0
    mantissa: int = 0

    @cached_property
    def table(self) -> Tensor:
        """fp32 [2 ** bits]: what each code stands for."""
        codes = torch.arange(1 << self.bits)
        if self.integer:
            return (codes - (1 << (self.bits - 1) if self.signed else 0)).float()
        fraction = (codes & ((1 << self.mantissa) - 1)).double() / (1 << self.mantissa)
        power = (codes >> self.mantissa) & ((1 << self.exponent) - 1)
        bias = (1 << (self.exponent - 1)) - 1
        normal = (power > 0).double()
        size = (normal + fraction) * torch.exp2((power.clamp(min=1) - bias).double())
        sign = 1 - 2 * (codes >> (self.bits - 1)) if self.signed else 1
        return (size * sign).float()


def number(name: str) -> Number:
    """The dtype of that name. Raises OpError for an unknown one and for more than eight bits."""
    match = _NAME.fullmatch(name)
    if match is not None and match["short"]:  # fp5 is float5_e2m2fn, ufp5 float5_e2m3fnu
        bits, signed = int(match["of"]), match["short"] == "fp"
        return Number(name, bits, signed, False, bits // 2, bits - bits // 2 - signed)
    if match is not None and match["integer"]:
        return Number(name, int(match["bits"]), match["integer"] == "int", integer=True)
    if match is not None:
        signed = not match["unsigned"]
        width, exponent, mantissa = (int(match[k]) for k in ("width", "exponent", "mantissa"))
        if width == signed + exponent + mantissa:
            return Number(name, width, signed, False, exponent, mantissa)
    raise OpError("SDNQ's dtype is not known here", found=name[:40], needed="2 to 8 bits")


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 of any shape -> the codes in it, uint8 [n]. OpError if bytes are left over."""
    pieces = _PIECES[bits]
    count, width = (1 + max(piece[i] for piece in pieces) for i in (0, 1))
    if packed.numel() % width:
        raise OpError(
            f"codes of {bits} bits come in {width} bytes", found=f"{packed.numel()} bytes"
        )
    data = packed.reshape(-1, width)
    codes = torch.zeros((len(data), count), dtype=torch.uint8, device=packed.device)
    for code, byte, at, size, first in pieces:
        codes[:, code] |= ((data[:, byte] >> at) & ((1 << size) - 1)) << first
    return codes.view(-1)
