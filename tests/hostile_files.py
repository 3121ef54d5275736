"""Broken and hostile model files by construction: one of each way to lie in a header.

A :class:`Case` is the bytes of a file and what an error must name. The files are made from small
good ones by hand, so that nothing of the package's writers smooths them over.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = (1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
DEEP = "[" * 100_000  # JSON deeper than a parser goes


@dataclass(frozen=True)
class Case:
    """``tensor``: what the error names; ``size``: the file is this long, with holes at its end."""

    name: str
    content: bytes
    tensor: str | None = None
    size: int = 0

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content)
        if self.size:
            with open(path, "r+b") as file:
                file.truncate(self.size)
        return path


# --- safetensors ----------------------------------------------------------------------------------

NAME = "layers.0.attention.o.weight"
_GOOD = {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}
_OTHER = {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]}


def safetensors(header: dict[str, Any] | bytes, data: int = 72, length: int | None = None) -> bytes:
    """A safetensors file from a header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def _entry(**changes: Any) -> dict[str, Any]:
    return {NAME: {**_GOOD, **changes}, "other": _OTHER}


_WRONG_ENTRIES: dict[str, dict[str, Any]] = {
    "dtype unknown": {"dtype": "F7"},
    "dtype in lower case": {"dtype": "bf16"},
    "dtype null": {"dtype": None},
    "dtype a list": {"dtype": ["BF16"]},
    "dtype of another width": {"dtype": "F64"},
    "shape negative": {"shape": [-4, -8]},
    "shape of floats": {"shape": [4.0, 8]},
    "shape of booleans": {"shape": [True, 32]},
    "shape of texts": {"shape": ["4", "8"]},
    "shape nested": {"shape": [[4, 8]]},
    "shape a number": {"shape": 32},
    "shape null": {"shape": None},
    "shape of 2^63": {"shape": [1 << 63]},
    "shape that overflows to the right size": {"shape": [1 << 63, 2, 32]},
    "shape with a product beyond floats": {"shape": [(1 << 63) - 1] * 32},
    "shape of a thousand dimensions": {"shape": [1] * 1000},
    "shape of a million dimensions": {"shape": [1] * 1_000_000},
    "shape of other data": {"shape": [4, 9]},
    "shape empty": {"shape": [0, 8]},
    "offsets reversed": {"data_offsets": [64, 0]},
    "offsets negative": {"data_offsets": [-64, 0]},
    "offsets one": {"data_offsets": [64]},
    "offsets three": {"data_offsets": [0, 64, 72]},
    "offsets of floats": {"data_offsets": [0.0, 64.0]},
    "offsets of texts": {"data_offsets": ["0", "64"]},
    "offsets null": {"data_offsets": None},
    "offsets of 2^63": {"data_offsets": [1 << 63, (1 << 63) + 64]},
    "offsets of 2^64": {"data_offsets": [1 << 64, (1 << 64) + 64]},
    "offsets beyond the file": {"data_offsets": [1 << 40, (1 << 40) + 64]},
    "offsets over the file's end": {"data_offsets": [72, 136]},
    "offsets over another tensor": {"data_offsets": [8, 72]},
}

_TEXTS = {
    "nothing but a length": b"",
    "no object": b"[1, 2, 3]",
    "a number": b"{".ljust(16),
    "half an object": b'{"a": {"dtype": "F32"',
    "bytes that are no UTF-8": b'{"\xff\xfe": 1}',
    "half of a surrogate pair": b'{"\\ud800": 1}',
    "trailing text": b"{} {}",
    "nested 100,000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of a million digits": b'{"a": ' + b"1" * 1_000_000 + b"}",
    "a million lists": b'{"a": [' + b"[]," * 1_000_000 + b"[]]}",
    "a million objects": b'{"a": [' + b"{}," * 1_000_000 + b"{}]}",
    "a million texts": b'{"a": [' + b'"b",' * 1_000_000 + b'"b"]}',
    "a million numbers": b'{"a": [' + b"1e9," * 1_000_000 + b"1]}",
    "400,000 keys": b"{" + b",".join(b'"%d":1' % i for i in range(400_000)) + b"}",
    "NaN": b'{"a": NaN}',
}

_METADATA = {
    "metadata a list": [],
    "metadata a text": "x",
    "metadata with a number": {"a": 1},
    "metadata with an object": {"a": {}},
    "metadata null": None,
}


def safetensors_cases() -> Iterator[Case]:
    """Every way to be no safetensors file."""
    good = safetensors(_entry())
    for name, change in _WRONG_ENTRIES.items():
        tensor = None if name.endswith("million dimensions") else NAME
        yield Case(name, safetensors(_entry(**change)), tensor)
    for name, text in _TEXTS.items():
        yield Case(name, safetensors(text))
    for name, metadata in _METADATA.items():
        yield Case(name, safetensors({"__metadata__": metadata, **_entry()}))
    for key in _GOOD:
        missing = {NAME: {k: v for k, v in _GOOD.items() if k != key}}
        yield Case(f"entry without {key}", safetensors(missing), NAME)
    for value in (None, 1, "x", []):
        yield Case(f"entry {value!r}", safetensors({NAME: value}), NAME)
    twice = json.dumps(_GOOD).encode()
    yield Case("name twice", safetensors(b'{"a": %s, "a": %s}' % (twice, twice)))
    yield Case("key twice", safetensors(b'{"a": {"dtype": "F32", "dtype": "BF16"}}'))
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    yield Case("20,000 tensors", safetensors(many))
    for name, longest in {
        "picture of letters": b"x" * 6_291_000,
        "picture of letters of four bytes": "\N{GRINNING FACE}".encode() * 1_572_000,
        "the same and an escape": "\N{GRINNING FACE}".encode() * 1_572_000 + rb"\ud83d\ude00",
    }.items():
        said = b'{"__metadata__": {"modelspec.thumbnail": "%s"}}' % longest
        yield Case(name, safetensors(said))
    for length in (4_194_303, 6_291_400):
        numbers = b'{"t": {"shape": [' + b"1," * (length // 2 - 20) + b"1]}}"
        yield Case(f"{length} bytes of numbers", safetensors(numbers))
    for length in (0, 1, len(good), 1 << 20, 6_291_457, 100_000_001, *HUGE):
        wrong = struct.pack("<Q", length) + good[8:]
        yield Case(f"header of {length} bytes", wrong)
        yield Case(f"header of {length} bytes in a long file", wrong, size=1 << 34)
    for size in range(len(good) - 1):
        yield Case(f"cut at {size}", good[:size])
    yield Case("last byte missing", good[:-1], "other")


# --- GGUF -----------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    """A length and UTF-8, or something else."""
    return struct.pack("<Q", len(value)) + value


def gguf(
    infos: list[bytes] | None = None,
    metadata: list[bytes] | None = None,
    *,
    data: int = 4096,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file from the bytes of its parts; ``counts`` says of how many it claims to be."""
    infos, metadata = infos or [], metadata or []
    numbers = counts or (len(infos), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(metadata) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


def info(name: bytes = b"t", dims=(32,), kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def entry(kind: int, payload: bytes, key: bytes = b"k") -> bytes:
    """A metadata key with its value."""
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    """The value of a metadata array."""
    return struct.pack("<IQ", kind, count) + payload


_NESTED = array(9, 1) * 3 + array(0, 0)

_GGUF_PARTS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "text beyond the file": ([], [entry(8, struct.pack("<Q", 1 << 40))]),
    "text of 5 MB": ([], [entry(8, text(b"x" * 5_000_000))]),
    "texts of 5 MB in wide characters": (
        [],
        [entry(8, text("😀".encode() * 250_000), b"%d" % i) for i in range(5)],
    ),
    "key that is no UTF-8": ([], [entry(0, b"\1", b"\xff\xff")]),
    "text that is no UTF-8": ([], [entry(8, text(b"\xff\xff"))]),
    "key twice": ([], [entry(0, b"\1")] * 2),
    "value type": ([], [entry(13, b"\1")]),
    "array type": ([], [entry(9, array(13, 1))]),
    "array nested 5 deep": ([], [entry(9, array(9, 1) + _NESTED)]),
    "a million inner arrays": ([], [entry(9, array(9, 1_000_000, array(0, 0) * 1_000_000))]),
    "alignment 0": ([], [entry(4, struct.pack("<I", 0), b"general.alignment")]),
    "alignment 3": ([], [entry(4, struct.pack("<I", 3), b"general.alignment")]),
    "alignment 2^31": ([], [entry(4, struct.pack("<I", 1 << 31), b"general.alignment")]),
    "alignment negative": ([], [entry(5, struct.pack("<i", -32), b"general.alignment")]),
    "alignment a text": ([], [entry(8, text(b"32"), b"general.alignment")]),
    "alignment a list": ([], [entry(9, array(4, 1, b"\0" * 4), b"general.alignment")]),
    "name that is no UTF-8": ([info(b"\xff")], []),
    "name empty": ([info(b"")], []),
}

_GGUF_TENSORS: dict[str, list[bytes]] = {
    "name twice": [info(), info(offset=128)],
    "five dimensions": [info(dims=(1,) * 5)],
    "dimension 0": [info(dims=(32, 0))],
    "dimensions of 2^64 in all": [info(dims=(1 << 32, 1 << 32))],
    "dimensions of 2^256": [info(dims=((1 << 64) - 1,) * 4)],
    "type unknown": [info(kind=777)],
    "type removed": [info(kind=4)],
    "rows that end inside a block": [info(dims=(31,), kind=8)],
    "offset unaligned": [info(offset=1)],
    "offset of 2^63": [info(offset=1 << 63)],
    "offset that wraps around": [info(offset=(1 << 64) - 32)],
    "offset beyond the file": [info(offset=1 << 40)],
    "data beyond the file": [info(dims=(1 << 20,))],
    "data over another tensor": [info(b"t", (64,)), info(b"u", offset=128)],
}


def gguf_cases() -> Iterator[Case]:
    """Every way to be no GGUF file."""
    good = gguf([info(), info(b"u", offset=128)], [entry(8, text(b"ideogram4"))], data=256)
    for name, (infos, metadata) in _GGUF_PARTS.items():
        yield Case(name, gguf(infos, metadata))
    for name, infos in _GGUF_TENSORS.items():
        yield Case(name, gguf(infos), "t")
    for value in HUGE:
        yield Case(f"{value} tensors", gguf(counts=(value, 0)))
        yield Case(f"{value} keys", gguf(counts=(0, value)))
        for kind in (0, 8, 9, 12):
            yield Case(f"array {kind} of {value}", gguf([], [entry(9, array(kind, value))]))
            long = gguf([], [entry(9, array(kind, value))])
            yield Case(f"array {kind} of {value} in a long file", long, size=1 << 34)
    yield Case("20,000 tensors", gguf([info(b"%d" % i) for i in range(20_000)]))
    for version in (0, 1, 4, 1 << 24, 3 << 24):
        yield Case(f"version {version}", good[:4] + struct.pack("<I", version) + good[8:])
    for size in range(len(good)):
        yield Case(f"cut at {size}", good[:size])
    yield Case("last byte missing", good[:-1], "u")


def field_mutations(header: bytes) -> Iterator[bytes]:
    """``header`` with every aligned and unaligned 8 bytes replaced by numbers that hurt."""
    for at in range(0, len(header) - 8):
        for value in (0, (1 << 32) - 1, 1 << 63, (1 << 64) - 1):
            yield header[:at] + struct.pack("<Q", value) + header[at + 8 :]


def value_mutations(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A safetensors header with each of its values replaced by what does not belong there."""
    strangers = (None, True, -1, 0, 1 << 63, 1.5, "", "x", [], [0], {}, {"a": 1})
    for name, entry in header.items():
        for stranger in strangers:
            yield {**header, name: stranger}
        for key in entry:
            for stranger in strangers:
                yield {**header, name: {**entry, key: stranger}}
