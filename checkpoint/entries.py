"""A model's tensors, each as the stored pieces that make it: read one by one, checked, named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CorruptFileError, OpError
from ..ops.fold import Fold
from ..ops.layouts.weight import Weight
from ..ops.linear import ACTIVATION_DTYPES
from .codecs import Blocks, Int8, Stored, Unquantized
from .float8 import Fp8, Int8Blocks
from .folding import StoredFolding
from .mapped import FileMapping, origin
from .microscaled import MXFP8, NVFP4
from .nf4 import Nf4
from .parts import DENSE_PRODUCT, Parts
from .saved import SavedBlocks, SavedFolded
from .sdnq import Sdnq
from .stock import AWQ, W4A4, W4A8
from .stored_rows import StoredRows
from .svdquant import SvdQuant

logger = logging.getLogger(__name__)

# The first that claims a weight reads it.
CODECS: tuple[type[Stored], ...] = (
    *(Nf4, SavedBlocks, SavedFolded, Sdnq),
    *(W4A8, W4A4, NVFP4, MXFP8, AWQ, SvdQuant),
    *(Int8Blocks, Int8, Fp8, Blocks, Unquantized),
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: a single stored weight, or several whose rows follow each other.

    ``stored_folding`` is that of the file, which :meth:`read` undoes.
    """

    name: str
    pieces: tuple[Parts, ...]
    linear: bool
    stored_folding: StoredFolding | None = None

    @cached_property
    def codecs(self) -> tuple[type[Stored], ...]:
        """The format of each piece.

        Raises CheckpointError, naming the tensor, for one that no format claims, or that has more
        beside it than its format uses.
        """
        found = []
        for parts in self.pieces:
            codec = next((codec for codec in CODECS if codec.claims(parts)), None)
            stated = None if codec else parts.quantization().get("format")
            if stated is not None:
                raise parts.variant(str(stated)[:80])
            parts.check_understood(codec.ROLES if codec else ())
            if codec is None:
                raise parts.unsupported(f"{parts.weight.dtype} without a description")
            found.append(codec)
        return tuple(found)

    @cached_property
    def level(self) -> str:
        """The level of the pieces; if they differ ``BF16``, as they are joined as floats then, or
        what their one format says.
        """
        levels = {c.level(p) for c, p in zip(self.codecs, self.pieces, strict=True)}
        if len(levels) == 1:
            return levels.pop()
        return self.codecs[0].joined_level(levels) if len(set(self.codecs)) == 1 else "BF16"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """As the model needs it."""
        shapes = [c.shape(p) for c, p in zip(self.codecs, self.pieces, strict=True)]
        if len(shapes) == 1:
            return shapes[0]
        width = shapes[0][-1]
        if any(len(shape) != 2 or shape[1] != width for shape in shapes):
            raise self.pieces[0].corrupt("the pieces differ in width", shapes, "[n, K] each")
        return sum(shape[0] for shape in shapes), width

    @property
    def wants_dense(self) -> bool:
        """Whether the file asks for a 16-bit product of an int8 weight."""
        int8 = all(codec is Int8 for codec in self.codecs)
        return int8 and all(parts.setting(DENSE_PRODUCT, False) is True for parts in self.pieces)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(parts.nbytes for parts in self.pieces)

    def check(self) -> None:
        """CheckpointError unless the headers say that the weight can be read, and how.

        Opening a file does this for every tensor, so that nothing is found out while it loads.
        """
        _ = self.level

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor: for a quantized linear a QuantizedTensor, else floats in ``dtype``.

        In original coordinates, whatever was folded into it. Raises CorruptFileError if the values
        of stored parts do not fit each other; :meth:`check` has looked at all the rest.
        """
        try:
            stored = [c.read(p) for c, p in zip(self.codecs, self.pieces, strict=True)]
            whole = stored[0] if len(stored) == 1 else self._stack(stored)
            fold = self._fold()
            if fold is not None and whole is not None and self.linear:
                return whole.unfolded(fold, dtype)
            if fold is not None:
                dense = torch.cat([item.dense(torch.float32) for item in stored])
                return fold.unfold(dense.reshape(len(dense), -1)).reshape(dense.shape).to(dtype)
            if whole is None:
                return torch.cat([item.dense(dtype) for item in stored])
            return whole.tensor(dtype) if self.linear else whole.dense(dtype)
        except OpError as error:
            raise CorruptFileError(
                error.message,
                file=self.pieces[0].weight.file.path,
                tensor=self.pieces[0].key,
                found=error.found,
                needed=error.needed,
                hint=CHECK_DOWNLOAD,
            ) from error

    def rows(self) -> StoredRows | None:
        """The tensor as rows that are read when asked for; None unless it lies there as it is:
        one matrix of plain floats, with nothing folded into it."""
        plain = self.codecs == (Unquantized,) and self._fold() is None
        raw = self.pieces[0].weight
        return StoredRows(raw) if plain and StoredRows.fits(raw) else None

    def mapped(self, mapping: FileMapping) -> Entry:
        """The same tensor, read as views of mapped files where it is stored as it is used."""
        return replace(self, pieces=tuple(parts.mapped(mapping.over) for parts in self.pieces))

    def _fold(self) -> Fold | None:
        if self.stored_folding is None or not self.name.endswith(".weight"):
            return None
        fold = self.stored_folding.folding.of(self.name.removesuffix(".weight"), self.shape[0])
        if fold is not None:
            fold.check((self.shape[0], math.prod(self.shape[1:])))
        return fold

    def _stack(self, stored: list[Stored]) -> Stored | None:
        kinds = {type(item) for item in stored}
        whole = stored[0].stack(stored) if len(kinds) == 1 else None
        if whole is None:
            logger.warning(
                "%s: %s is stored in pieces of different formats (%s); it is kept in full "
                "precision, which takes more memory",
                self.pieces[0].weight.file.path,
                self.name,
                ", ".join(
                    codec.level(p) for codec, p in zip(self.codecs, self.pieces, strict=True)
                ),
            )
        return whole


def stream_entries(
    entries: Mapping[str, Entry],
    needed: Collection[str],
    dtype: torch.dtype,
    progress: Progress | None,
    mapping: FileMapping | None = None,
    *,
    by_rows: bool = False,
) -> Iterator[tuple[str, Tensor | StoredRows]]:
    """``(name, tensor)`` for each of ``needed``, holding one at a time.

    ``progress(done, total)`` counts stored bytes. ``mapping``: read views of mapped files, which
    takes no memory but for what is not used as it is stored. ``by_rows``: matrices that lie there
    as they are come as StoredRows. Raises OpError, at once, for a dtype that weights are not
    dequantized to.
    """
    if dtype not in ACTIVATION_DTYPES:
        raise OpError("a weight has no such dtype", found=dtype, needed=ACTIVATION_DTYPES)
    return _stream(entries, needed, dtype, progress, mapping, by_rows)


def _stream(
    entries: Mapping[str, Entry],
    needed: Collection[str],
    dtype: torch.dtype,
    progress: Progress | None,
    mapping: FileMapping | None,
    by_rows: bool,
) -> Iterator[tuple[str, Tensor | StoredRows]]:
    total = sum(entries[name].nbytes for name in needed)
    done = 0
    for name in needed:
        entry = entries[name] if mapping is None else entries[name].mapped(mapping)
        rows = entry.rows() if by_rows else None
        tensor = entry.read(dtype) if rows is None else rows
        if isinstance(tensor, Weight) and origin(tensor._qdata) is not None:
            tensor.borrowed = True  # whoever writes to it gets memory of its own
        yield name, tensor
        done += entries[name].nbytes
        if progress is not None:
            progress(done, total)


def check_shapes(entries: Mapping[str, Entry], needed: Mapping[str, tuple[int, ...]]) -> None:
    """CorruptFileError for the first of ``entries`` that has not the ``needed`` shape."""
    for name, shape in needed.items():
        entry = entries[name]
        if entry.shape != shape:
            raise entry.pieces[0].corrupt(
                "the tensor does not fit the model", list(entry.shape), list(shape)
            )


def main_level(entries: Iterable[Entry]) -> str:
    """The level that most weights of the linears have: in bytes, few of 16 bits outweigh many of 2.

    Raises CheckpointError for a linear in a format that is not read.
    """
    size: dict[str, int] = {}
    for entry in entries:
        if entry.linear:
            size[entry.level] = size.get(entry.level, 0) + math.prod(entry.shape)
    return max(size, key=size.__getitem__) if size else "BF16"


@dataclass(frozen=True)
class Storage:
    """Linears of one level: how many, their weights, their stored bytes, and how many of them the
    file wants multiplied in 16 bits though they are stored as int8.
    """

    level: str
    linears: int
    weights: int
    nbytes: int
    dense: int

    @property
    def bits(self) -> float:
        """Stored bits a weight, scales included."""
        return 8 * self.nbytes / self.weights


def storage_of(entries: Iterable[Entry]) -> tuple[Storage, ...]:
    """One ``Storage`` a level, the one with most weights first.

    Raises CheckpointError for a linear in a format that is not read.
    """
    found: dict[str, Storage] = {}
    for entry in entries:
        if entry.linear:
            old = found.get(entry.level, Storage(entry.level, 0, 0, 0, 0))
            found[entry.level] = Storage(
                entry.level,
                old.linears + 1,
                old.weights + math.prod(entry.shape),
                old.nbytes + entry.nbytes,
                old.dense + entry.wants_dense,
            )
    return tuple(sorted(found.values(), key=lambda kind: (-kind.weights, kind.level)))


def unquantized(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Modules of linears that a quantized model keeps in floats; () if none is quantized."""
    floats = [entry.name for entry in entries.values() if entry.linear and entry.level == "BF16"]
    if len(floats) == sum(entry.linear for entry in entries.values()):
        return ()
    return tuple(name.removesuffix(".weight") for name in floats)
