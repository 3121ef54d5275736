"""Ideogram 4 files opened by their headers: what they hold, and their tensors by canonical name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    CHECK_DOWNLOAD,
    CheckpointError,
    CorruptFileError,
    MissingBaseError,
    PairMismatchError,
)
from .attention_wish import attention_wish
from .branches import OneBranch
from .canonical import TEXT_ONLY, canonical_shapes
from .config import ModelConfig, same_model
from .entries import (
    Entry,
    Progress,
    Storage,
    check_shapes,
    storage_of,
    stream_entries,
    unquantized,
)
from .folding import Folding
from .grammar import CONDITIONAL, UNCONDITIONAL
from .mapped import FileMapping
from .tensor_files import TensorFiles


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One or both copies of Ideogram 4 in files of any origin; only headers were read so far.

    ``level``: the one that most weights of the linears have. ``copies``: which of ``conditional``
    and ``unconditional`` it holds, ``copy_reason``: how that was told, ``copy_assumed``: nothing
    told it. ``one_branch``: why it needs no guidance; None for a model of two copies. ``bases``
    give what the files lack. Tensors come by canonical names (``canonical``).
    """

    origin: str
    level: str
    linears_only: bool
    copies: tuple[str, ...]
    copy_reason: str
    config: ModelConfig
    tensor_files: tuple[TensorFiles, ...]
    entries: Mapping[str, Mapping[str, Entry]]
    bases: tuple[Checkpoint, ...] = ()
    copy_assumed: bool = False
    one_branch: OneBranch | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, without those of a base."""
        return tuple(file.path for tensor_files in self.tensor_files for file in tensor_files.files)

    @property
    def size(self) -> int:
        """Bytes on the disk, without a base."""
        return sum(tensor_files.size for tensor_files in self.tensor_files)

    @property
    def metadata(self) -> dict[str, Any]:
        """The files' own metadata; where two files differ, the first one's."""
        merged: dict[str, Any] = {}
        for tensor_files in self.tensor_files:
            merged = tensor_files.metadata | merged
        return merged

    @cached_property
    def protected(self) -> tuple[str, ...]:
        """Linears that a quantized file keeps in floats: ``layers.0.feed_forward.w2``, or
        ``conditional.layers.0.feed_forward.w2`` where the file holds both copies."""
        several = len(self.copies) > 1
        return tuple(
            f"{copy}.{module}" if several else module
            for copy in self.copies
            for module in unquantized(self.entries[copy])
        )

    @property
    def storage(self) -> tuple[Storage, ...]:
        """How the linears of all copies are stored, by level, the one with most weights first."""
        entries = (entry for copy in self.copies for entry in self.entries[copy].values())
        return storage_of(entries)

    @cached_property
    def attention_wish(self) -> str | None:
        """The attention that the files ask for, by this pack's name; see ``attention_wish``."""
        return attention_wish(self.tensor_files)

    def folding(self, copy: str) -> Folding | None:
        """What was folded into a copy of these files; None for a file in original coordinates.

        ``load`` and ``stream`` have undone it. Raises CorruptFileError for a record that no writer
        leaves.
        """
        stored = next((e.stored_folding for e in self.entries.get(copy, {}).values()), None)
        return None if stored is None else stored.folding

    def reads_text(self, copy: str) -> bool:
        """Whether ``llm_cond_norm`` and ``llm_cond_proj`` are there; the unconditional copy never
        uses them, and some files leave them out of it."""
        return _reads_text(self.entries.get(copy, {}))

    def shapes(self, copy: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of what :meth:`stream` yields, in its order; headers alone.

        An unconditional copy may be without ``llm_cond_norm`` and ``llm_cond_proj``. Raises
        MissingBaseError or CorruptFileError, naming the first of the tensors that neither the file
        nor a base holds, and CorruptFileError for a shape that does not fit.
        """
        return self._plan(copy)[1]

    def stream(
        self,
        copy: str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        only: Collection[str] | None = None,
        by_rows: bool = False,
        mapping: FileMapping | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """``(canonical name, tensor)`` one by one; memory holds one tensor at a time.

        A quantized linear is a QuantizedTensor that dequantizes to ``dtype``; everything else is
        in ``dtype``. ``progress(done, total)`` counts stored bytes. ``only``: the names wanted,
        all of them if None. ``by_rows``: matrices of plain floats come as ``StoredRows``, which
        reads rows in their stored dtype when they are indexed. ``mapping``: quantized weights, and
        floats that are ``dtype`` in the file, are views of mapped files. Raises what
        :meth:`shapes` raises, before anything is read.
        """
        entries, shapes = self._plan(copy)
        names = [name for name in shapes if only is None or name in only]
        return stream_entries(entries, names, dtype, progress, mapping, by_rows=by_rows)

    def load(
        self,
        copy: str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        mapping: FileMapping | None = None,
    ) -> dict[str, Tensor]:
        """All tensors of a copy: what :meth:`stream` yields, as a dict."""
        return dict(self.stream(copy, dtype=dtype, progress=progress, mapping=mapping))

    def _plan(self, copy: str) -> tuple[dict[str, Entry], dict[str, tuple[int, ...]]]:
        """(entries, shapes) of a copy, the file's own before those of the bases, all checked."""
        if copy not in self.copies:
            raise CheckpointError(
                f"the {copy} copy is not in this file",
                file=self.paths[0],
                found=f"{', '.join(self.copies)} ({self.copy_reason})",
                needed=copy,
                hint="Open the file of the other copy.",
            )
        entries: dict[str, Entry] = {}
        for checkpoint in (*reversed(self.bases), self):  # the first base goes before the next
            entries |= checkpoint.entries.get(copy, {})
        needed = canonical_shapes(self.config)
        if copy == UNCONDITIONAL and not _reads_text(entries):
            needed = {name: shape for name, shape in needed.items() if name not in TEXT_ONLY}
        missing = [name for name in needed if name not in entries]
        if missing:
            raise self._incomplete(copy, missing)
        check_shapes(entries, needed)
        return entries, needed

    def _incomplete(self, copy: str, missing: Sequence[str]) -> CheckpointError:
        wanting = self.linears_only or bool(self.bases)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        shown = ", ".join(missing[:3]) + more
        base = " and ".join(str(path) for b in self.bases for path in b.paths[:1])
        return (MissingBaseError if wanting else CorruptFileError)(
            f"{len(missing)} tensors of the {copy} copy are missing: {shown}",
            file=self.paths[0],
            found=f"base {base}" if base else "no base file",
            needed=f"a base file with the {copy} copy" if wanting else None,
            hint="Give the FP8 or BF16 file of this copy as base." if wanting else CHECK_DOWNLOAD,
        )


def _reads_text(names: Collection[str]) -> bool:
    return any(name in names for name in TEXT_ONLY)


def check_pair(conditional: Checkpoint, unconditional: Checkpoint) -> None:
    """PairMismatchError unless the two hold the two copies of one model; they may be the same."""
    for checkpoint in (conditional, unconditional):
        if checkpoint.one_branch is not None:
            raise PairMismatchError(
                "a one-branch model has no other copy: it needs no guidance",
                file=checkpoint.paths[0],
                found=checkpoint.one_branch.reason,
                hint="Leave the unconditional copy out; if this file is one of two copies, say so: "
                "branches, in the loader or on the command line.",
            )
    for checkpoint, copy in ((conditional, CONDITIONAL), (unconditional, UNCONDITIONAL)):
        if copy not in checkpoint.copies:
            raise PairMismatchError(
                f"this is not the {copy} copy",
                file=checkpoint.paths[0],
                found=f"{', '.join(checkpoint.copies)} ({checkpoint.copy_reason})",
                needed=copy,
                hint=f"Pick the file of the {copy} copy; the two are different files.",
            )
    # Without its text part the unconditional copy does not tell how wide the text is.
    reads_text = unconditional.reads_text(UNCONDITIONAL)
    ignore = () if reads_text else ("llm_features_dim",)
    differing = same_model(conditional.config, unconditional.config, ignore=ignore)
    if differing:
        raise PairMismatchError(
            f"the copy does not belong to {conditional.paths[0]}",
            file=unconditional.paths[0],
            found=differing,
            hint="Pick two files of the same release.",
        )
