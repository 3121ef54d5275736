"""GGUF files written as a stream: the header first, then one tensor at a time."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.new_file import WriteError, new_file
from ..files.partial import Partial
from .reader import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS
from .types import SCALAR_CODES, TENSOR_TYPES, ValueType

_MAX_NAME = 63  # ggml holds names in 64 bytes, the last one zero
_VERSION = 3


class GGUFWriteError(WriteError):
    """Tensors or metadata that the format cannot hold, or data other than what was announced."""


class Typed(NamedTuple):
    """A metadata value whose type is said, not derived from the Python value."""

    type: ValueType
    value: Any


@dataclass(frozen=True)
class GGUFSpec:
    """What the header says of one tensor; ``shape`` in torch's order ([N, K])."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int

    @property
    def nbytes(self) -> int:
        kind = TENSOR_TYPES[self.ggml_type]
        return math.prod(self.shape) // kind.block_size * kind.type_size


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Iterable[GGUFSpec] | Iterable[tuple[str, Sequence[int], int, Tensor]],
    metadata: Mapping[str, Any],
    *,
    data: Iterable[tuple[str, Tensor]] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    partial: Partial | None = None,
) -> int:
    """Write ``tensors`` and ``metadata`` to ``path`` as GGUF version 3; returns its size in bytes.

    Either ``tensors`` are ``(name, shape, ggml_type, tensor)``, or they are the :class:`GGUFSpec`
    of each, and ``data`` yields every one of them once as ``(name, tensor)``, in any order; then
    only the tensor just yielded is held. A tensor's bytes are what counts: blocks as uint8, or
    float32, float16 and bfloat16 for F32, F16 and BF16. ``progress(done, total)`` counts bytes of
    tensor data.

    Metadata values: bool, int (uint32, int32, uint64 or int64, the first that fits), float
    (float32), str, a list or tuple of one of these, or :class:`Typed`. The order of ``metadata``
    and ``tensors`` is kept: same input, same bytes. ``general.alignment`` is obeyed.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed;
    with ``partial`` tensors of an earlier run may be skipped.
    Raises GGUFWriteError for a name, type, shape, value or data that does not fit the format or the
    announcement, and what `files.new_file.new_file` raises; then ``path`` is as it was.
    """
    path = Path(path)
    if data is None:
        items = list(tensors)
        specs = [GGUFSpec(name, tuple(shape), kind) for name, shape, kind, _ in items]
        data = ((item[0], item[3]) for item in items)
    else:
        specs = list(tensors)
    header, offsets, size = _encode_header(specs, metadata, path)
    by_name = {spec.name: spec for spec in specs}
    total = sum(spec.nbytes for spec in specs)
    waiting = set(by_name)
    with new_file(path, size, overwrite=overwrite, partial=partial) as file:
        file.write_at(0, header)
        file.resume({spec.name: (offsets[spec.name], spec.nbytes) for spec in specs})
        for name, tensor in data:
            spec = by_name.get(name)
            if spec is None or name not in waiting:
                problem = "came twice" if spec else "was not announced"
                raise GGUFWriteError(f"data {problem}", file=path, tensor=name)
            waiting.remove(name)
            file.write_at(offsets[name], _tensor_bytes(tensor, spec, path), part=name)
            if progress is not None:
                left = sum(by_name[each].nbytes for each in file.missing(waiting))
                progress(total - left, total)
        missing = file.missing(waiting)
        if missing:
            first = next(spec.name for spec in specs if spec.name in missing)
            raise GGUFWriteError(f"{len(missing)} tensors got no data", file=path, tensor=first)
    return size


def _encode_header(
    specs: list[GGUFSpec], metadata: Mapping[str, Any], path: Path
) -> tuple[bytes, dict[str, int], int]:
    """(header padded to the alignment, offset of each tensor in the file, size of the file)."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    alignment = alignment.value if isinstance(alignment, Typed) else alignment
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise GGUFWriteError("general.alignment is no power of two", file=path, found=alignment)
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(specs), len(metadata)))
    for key, value in metadata.items():
        try:
            out += _text(key) + _value(value)
        except (struct.error, TypeError, OverflowError, ValueError) as error:
            raise GGUFWriteError(
                f"metadata {key!r} cannot be stored: {error}", file=path, found=repr(value)[:80]
            ) from error
    relative: dict[str, int] = {}
    end = 0
    for spec in specs:
        _check_spec(spec, relative, path)
        relative[spec.name] = end
        out += _text(spec.name) + struct.pack("<I", len(spec.shape))
        out += struct.pack(f"<{len(spec.shape)}Q", *reversed(spec.shape))
        out += struct.pack("<IQ", spec.ggml_type, end)
        end += spec.nbytes + -spec.nbytes % alignment
    out += bytes(-len(out) % alignment)
    return bytes(out), {name: len(out) + at for name, at in relative.items()}, len(out) + end


def _check_spec(spec: GGUFSpec, taken: Mapping[str, int], path: Path) -> None:
    def refused(message: str, found: object = None, needed: object = None) -> GGUFWriteError:
        return GGUFWriteError(message, file=path, tensor=spec.name, found=found, needed=needed)

    if not spec.name or spec.name in taken:
        raise refused("the name is empty or taken already")
    if len(spec.name.encode()) > _MAX_NAME:
        raise refused("the name is too long", len(spec.name.encode()), f"at most {_MAX_NAME} bytes")
    kind = TENSOR_TYPES.get(spec.ggml_type)
    if kind is None:
        raise refused("unknown ggml type", spec.ggml_type)
    if len(spec.shape) > MAX_DIMS or any(size < 1 for size in spec.shape):
        raise refused("impossible shape", list(spec.shape), f"up to {MAX_DIMS} positive dimensions")
    row = spec.shape[-1] if spec.shape else 1
    if row % kind.block_size:
        raise refused(
            f"rows do not divide into blocks of {kind.name}",
            f"{row} elements a row",
            f"a multiple of {kind.block_size}",
        )


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type, then value."""
    kind, value = _typed(value)
    return struct.pack("<I", kind) + _payload(kind, value)


def _payload(kind: ValueType, value: Any) -> bytes:
    if kind is ValueType.STRING:
        return _text(value)
    if kind is not ValueType.ARRAY:
        return struct.pack("<" + SCALAR_CODES[kind], value)
    inner = [_typed(item) for item in value]
    kinds = {item.type for item in inner}
    if kinds and kinds <= _INTEGERS:
        # the smallest type for the widest element: [24, 20, -1] is int32 throughout
        kinds = {_integer_type(min(i.value for i in inner), max(i.value for i in inner))}
    if len(kinds) != 1:
        raise ValueError("an array needs elements, all of one type")
    (element,) = kinds
    head = struct.pack("<IQ", element, len(inner))
    return head + b"".join(_payload(element, item.value) for item in inner)


_INTEGERS = {ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64}


def _typed(value: Any) -> Typed:
    """The value with the type that :func:`write_gguf` promises for it."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return Typed(ValueType.BOOL, value)
    if isinstance(value, int):
        return Typed(_integer_type(value, value), value)
    if isinstance(value, float):
        return Typed(ValueType.FLOAT32, value)
    if isinstance(value, str):
        return Typed(ValueType.STRING, value)
    if isinstance(value, list | tuple):
        return Typed(ValueType.ARRAY, value)
    raise TypeError(f"no GGUF type for {type(value).__name__}")


def _integer_type(low: int, high: int) -> ValueType:
    if low >= 0:
        return ValueType.UINT32 if high < 1 << 32 else ValueType.UINT64
    small = low >= -(1 << 31) and high < 1 << 31
    return ValueType.INT32 if small else ValueType.INT64


def _tensor_bytes(tensor: Tensor, spec: GGUFSpec, path: Path) -> memoryview:
    """The tensor's bytes in row-major order, as many as announced."""
    kind = TENSOR_TYPES[spec.ggml_type].name
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    allowed = {torch.uint8, dtypes.get(kind, torch.uint8)}
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.dtype not in allowed or nbytes != spec.nbytes:
        raise GGUFWriteError(
            "the data does not match what was announced",
            file=path,
            tensor=spec.name,
            found=f"{nbytes} bytes of {tensor.dtype}",
            needed=f"{spec.nbytes} bytes of {kind}",
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
