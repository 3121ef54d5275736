"""What a model file is, from its headers and, of int8, the largest codes of some rows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.entries import Storage
from ..checkpoint.level_order import MIXED
from ..checkpoint.tensor_files import open_tensor_files
from ..errors import printable
from .row_peaks import RowPeaks, divided_in_bf16
from .source import BaseLike
from .tables import human_bytes, text_table

_FOLDED = (
    "LoRAs are right in this pack, which undoes it, and wrong in hosts that do not know the fold.* "
    "tensors"
)
_SHOWN = 72  # characters of a metadata value in the table


@dataclass(frozen=True)
class TypeCount:
    """Stored tensors of one type: how many, their values, their bytes."""

    type: str
    tensors: int
    values: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_file` found; ``copy_reason`` says which rule told the copies apart.

    ``size`` in bytes, all files together; ``storage``: how the linears are stored, by level;
    ``types`` in the file's own words, largest first;
    ``protected``: linears that a quantized file keeps in high precision. ``folded``: linears whose
    inputs are divided, and some rotated, by the weights before them. ``bf16_division``: rows of
    int8 that show a quantizer which divided in bf16, None where none do. ``one_branch``: why it
    needs no guidance, None for copies of two.
    """

    path: str
    files: tuple[str, ...]
    origin: str
    level: str
    copies: tuple[str, ...]
    copy_reason: str
    config: Mapping[str, object]
    size: int
    storage: tuple[Storage, ...]
    types: tuple[TypeCount, ...]
    protected: tuple[str, ...]
    folded: tuple[str, ...]
    metadata: Mapping[str, object]
    bf16_division: RowPeaks | None = None
    one_branch: str | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready; metadata arrays and other long things as text."""
        found = asdict(self)
        found["metadata"] = {key: _json_ready(value) for key, value in self.metadata.items()}
        return found

    def table(self) -> str:
        """For reading: facts, types, protected linears, metadata."""
        levels = ", ".join(kind.level for kind in self.storage)
        facts = [
            ("file", self.path),
            ("origin", self.origin),
            ("level", f"{self.level}: {levels}" if self.level in MIXED else self.level),
            ("copies", f"{' + '.join(self.copies)} ({self.copy_reason})"),
            *([("guidance", f"none: one branch ({self.one_branch})")] if self.one_branch else []),
            ("size", f"{human_bytes(self.size)} in {len(self.files)} file(s)"),
            ("config", ", ".join(f"{key} {value}" for key, value in self.config.items())),
        ]
        facts += [("linears" if i == 0 else "", _stored(s)) for i, s in enumerate(self.storage)]
        if self.protected:
            facts.append(("protected", f"{len(self.protected)}: {', '.join(self.protected)}"))
        if self.folded:
            facts.append(("folded", f"{len(self.folded)} linears; {_FOLDED}"))
        if self.bf16_division:
            facts.append(("quantized in bf16", str(self.bf16_division)))
        width = max(len(name) for name, _ in facts)
        parts = ["\n".join(f"{name.ljust(width)}  {value}" for name, value in facts)]
        rows = [
            (t.type, str(t.tensors), f"{t.values:,}", human_bytes(t.nbytes)) for t in self.types
        ]
        parts.append(text_table(("type", "tensors", "values", "size"), rows))
        if self.metadata:
            lines = (f"  {_shown(key)}: {_shown(value)}" for key, value in self.metadata.items())
            parts.append("metadata\n" + "\n".join(lines))
        return "\n\n".join(parts)


def inspect_file(
    path: str | os.PathLike[str], base: BaseLike | Sequence[BaseLike] | None = None
) -> Inspection:
    """Origin, level, copies and why, config, types, sizes and metadata of a model file or folder.

    Reads headers, of a folded file what was folded, of an int8 one four linears a copy. Raises what
    ``open_checkpoint`` raises.
    """
    checkpoint = open_checkpoint(path, base)
    files = tuple(str(file) for file in checkpoint.paths)
    return Inspection(
        path=str(path),
        files=files,
        origin=checkpoint.origin,
        level=checkpoint.level,
        copies=tuple(checkpoint.copies),
        copy_reason=checkpoint.copy_reason,
        config=checkpoint.config.to_dict(),
        size=checkpoint.size,
        storage=checkpoint.storage,
        types=_types(checkpoint.paths),
        protected=tuple(checkpoint.protected),
        folded=_folded(checkpoint),
        metadata=checkpoint.metadata,
        bf16_division=divided_in_bf16(checkpoint),
        one_branch=checkpoint.one_branch and checkpoint.one_branch.reason,
    )


def _folded(checkpoint: Checkpoint) -> tuple[str, ...]:
    foldings = (checkpoint.folding(copy) for copy in checkpoint.copies)
    found = [name for folding in foldings if folding for name in folding.linears]
    return tuple(dict.fromkeys(found))


def _types(paths: tuple[Path, ...]) -> tuple[TypeCount, ...]:
    stored = {}
    for path in paths:  # a shard opens its siblings too: count each tensor once
        for tensor in open_tensor_files(path).tensors.values():
            stored[tensor.file.path, tensor.key] = tensor
    counts = []
    for kind in dict.fromkeys(tensor.dtype for tensor in stored.values()):
        of_kind = [tensor for tensor in stored.values() if tensor.dtype == kind]
        values = sum(math.prod(tensor.shape) for tensor in of_kind)
        nbytes = sum(tensor.nbytes for tensor in of_kind)
        counts.append(TypeCount(kind, len(of_kind), values, nbytes))
    return tuple(sorted(counts, key=lambda count: (-count.nbytes, count.type)))


def _stored(kind: Storage) -> str:
    """``102 as W4A8, 4.51 bits a weight``"""
    dense = f", {kind.dense} of them multiplied in 16 bits" if kind.dense else ""
    return f"{kind.linears} as {kind.level}, {kind.bits:.2f} bits a weight{dense}"


def _json_ready(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _shown(value: object) -> str:
    return printable(" ".join(str(value).split()), _SHOWN)
