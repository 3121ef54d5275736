"""Metadata of a GGUF header: scalars and texts at once, arrays left in the file.

A tokenizer's 150,000 strings are passed over, not built: that is the difference between a tenth of
a second and many seconds for opening a text encoder.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DOWNLOAD_AGAIN, CorruptFileError
from .cursor import Cursor
from .types import SCALAR_CODES, ValueType

_MAX_STRINGS = 1 << 22  # in all arrays together; a vocabulary has 150,000
_MAX_BUILT = 1 << 19  # elements of an array that is read into memory, inner ones included
_INNER_ARRAY = 32  # an array inside an array costs as much as that many strings
_MAX_NESTING = 4
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in SCALAR_CODES.items()}


@dataclass(frozen=True)
class ArrayRef:
    """A metadata array left in the file; :meth:`GGUFHeader.array` reads it.

    ``elements`` counts those of inner arrays too.
    """

    type: ValueType
    count: int
    offset: int
    nbytes: int
    elements: int


def read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """key -> bool, int, float, str or :class:`ArrayRef`; CorruptFileError for what is none."""
    metadata: dict[str, Any] = {}
    strings_left = _MAX_STRINGS
    for _ in range(count):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise CorruptFileError(f"metadata key {key!r} occurs twice", file=cursor.path)
        what = f"the value of {key!r}"
        kind = _value_type(cursor, what)
        if kind is ValueType.STRING:
            metadata[key] = cursor.text(what)
        elif kind is ValueType.ARRAY:
            metadata[key], strings_left = _skip_array(cursor, what, strings_left, _MAX_NESTING)
        else:
            metadata[key] = cursor.unpack(_SCALARS[kind], what)
    return metadata


def _value_type(cursor: Cursor, what: str) -> ValueType:
    number = cursor.u32(what)
    if number > max(ValueType):
        raise CorruptFileError(
            f"{what} has an unknown type",
            file=cursor.path,
            found=number,
            needed=f"0 to {max(ValueType):d}",
            hint=DOWNLOAD_AGAIN,
        )
    return ValueType(number)


def _skip_array(cursor: Cursor, what: str, budget: int, nesting: int) -> tuple[ArrayRef, int]:
    """Pass over an array; ``budget`` bounds the work on strings and inner arrays."""
    kind = _value_type(cursor, what)
    count = cursor.u64(what)
    start = cursor.pos
    if kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind].size, what)
        return ArrayRef(kind, count, start, cursor.pos - start, count), budget
    elements = count
    budget -= count * (_INNER_ARRAY if kind is ValueType.ARRAY else 1)
    if budget < 0 or (kind is ValueType.ARRAY and nesting == 1):
        raise CorruptFileError(
            f"{what} is too large or nested too deep",
            file=cursor.path,
            found=f"{count} elements",
            needed=f"at most {_MAX_STRINGS} strings in all, {_MAX_NESTING} levels",
            hint=DOWNLOAD_AGAIN,
        )
    if kind is ValueType.STRING:
        cursor.skip_texts(count, what)
    else:
        cursor.require(12 * count, what)  # every inner array takes 12 bytes at least
        for _ in range(count):
            inner, budget = _skip_array(cursor, what, budget, nesting - 1)
            elements += inner.elements
    return ArrayRef(kind, count, start, cursor.pos - start, elements), budget


def check_built(ref: ArrayRef, path: Path, key: str) -> None:
    """CorruptFileError for an array that is too long to build."""
    if ref.elements > _MAX_BUILT:
        raise CorruptFileError(
            f"the array {key!r} is too long", file=path, found=ref.elements, needed=_MAX_BUILT
        )


def decode_array(
    data: bytes, pos: int, kind: ValueType, count: int, path: Path, key: str
) -> tuple[list[Any], int]:
    """(elements, position behind them); lengths were checked when the header was read."""
    if kind in SCALAR_CODES:
        code = struct.Struct(f"<{count}{SCALAR_CODES[kind]}")
        return list(code.unpack_from(data, pos)), pos + code.size
    values: list[Any] = []
    for _ in range(count):
        if kind is ValueType.ARRAY:
            inner, length = struct.unpack_from("<IQ", data, pos)
            value, pos = decode_array(data, pos + 12, ValueType(inner), length, path, key)
        else:
            (length,) = struct.unpack_from("<Q", data, pos)
            raw = data[pos + 8 : pos + 8 + length]
            pos += 8 + length
            try:
                value = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorruptFileError(
                    f"element {len(values)} of {key!r} is not UTF-8",
                    file=path,
                    found=repr(raw[:40]),
                ) from error
        values.append(value)
    return values, pos
