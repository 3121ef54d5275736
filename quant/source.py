"""The file or files to quantize, seen the same way whatever their origin."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..checkpoint import Checkpoint, check_pair, open_checkpoint
from ..checkpoint.grammar import CONDITIONAL
from ..errors import PairMismatchError
from .errors import AlreadyQuantizedError, QuantOptionError
from .recipes import SOURCE_BITS, Recipe

_log = logging.getLogger(__name__)

BaseLike = Checkpoint | str | os.PathLike[str]
SourceLike = Checkpoint | str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """The copies that will be written, each with the checkpoint that holds it."""

    parts: tuple[tuple[Checkpoint, str], ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple({id(checkpoint): checkpoint for checkpoint, _ in self.parts}.values())

    @property
    def copies(self) -> tuple[str, ...]:
        return tuple(copy for _, copy in self.parts)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that is read, those of bases too, each once."""
        opened = [c for own in self.checkpoints for c in (own, *own.bases)]
        return tuple(dict.fromkeys(path for checkpoint in opened for path in checkpoint.paths))

    def paths_of(self, copy: str) -> tuple[Path, ...]:
        """The files that one copy is read from."""
        return files_of(next(checkpoint for checkpoint, each in self.parts if each == copy))

    @property
    def config(self) -> dict[str, object]:
        return self.checkpoints[0].config.to_dict()

    @property
    def metadata(self) -> dict[str, object]:
        merged: dict[str, object] = {}
        for checkpoint in self.checkpoints:
            merged = {**checkpoint.metadata, **merged}
        return merged

    @property
    def level(self) -> str:
        return " + ".join(dict.fromkeys(checkpoint.level for checkpoint in self.checkpoints))

    def shapes(self) -> dict[str, Mapping[str, tuple[int, ...]]]:
        """copy -> canonical tensor name -> shape, in the order in which they are read."""
        return {copy: checkpoint.shapes(copy) for checkpoint, copy in self.parts}

    def read(self, copy: str, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors of these canonical names, dense in fp32."""
        own = next(checkpoint for checkpoint, each in self.parts if each == copy)
        found = own.stream(copy, dtype=torch.float32, only=names)
        return {n: t.dequantize() if isinstance(t, QuantizedTensor) else t for n, t in found}

    def stream(self, only: Collection[tuple[str, str]]) -> Iterator[tuple[Path, str, str, Tensor]]:
        """(file, copy, name, tensor) of the ``only`` (copy, name) pairs, one at a time.

        Plain matrices are StoredRows, in their own dtype; dequantized the others are fp32.
        """
        for checkpoint, copy in self.parts:
            names = {name for each, name in only if each == copy}
            for name, tensor in checkpoint.stream(
                copy, dtype=torch.float32, only=names, by_rows=True
            ):
                yield Path(checkpoint.paths[0]), copy, name, tensor
                del tensor  # before the next one is read


def files_of(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Every file that a checkpoint is read from, those of its bases too, each once."""
    opened = (checkpoint, *checkpoint.bases)
    return tuple(dict.fromkeys(path for each in opened for path in each.paths))


def open_source(
    source: SourceLike,
    container: str,
    *,
    copy: str | None = None,
    base: BaseLike | Sequence[BaseLike] | None = None,
    pair: SourceLike | None = None,
) -> Source:
    """Open ``source`` and choose the copies: the file's only one, ``copy``, or both.

    Transformer Lab's container takes both unless ``copy`` says otherwise, the others hold one;
    ``pair`` is the file with the other copy, for that container. Raises PairMismatchError for a
    ``copy`` that is not in the file and for a pair that does not belong together, QuantOptionError
    where ``copy`` must be said, and what ``open_checkpoint`` raises.
    """
    if pair is not None and (container != "transformer-lab" or copy is not None):
        raise QuantOptionError(
            "a second source is for files with both copies",
            found=f"container {container}, copy {copy}",
            needed="container transformer-lab, no copy",
        )
    opened = [_open(each, base, copy) for each in (source, pair) if each is not None]
    if pair is not None:
        opened.sort(key=lambda checkpoint: checkpoint.copies != (CONDITIONAL,))
        check_pair(*opened)
    parts = []
    for checkpoint in opened:
        chosen = checkpoint.copies if copy is None else (copy,)
        parts += [(checkpoint, each) for each in chosen]
    if len(parts) > 1 and container != "transformer-lab":
        raise QuantOptionError(
            f"holds both copies, and the {container} container one copy a file",
            file=opened[0].paths[0],
            hint="Say which one (--copy conditional), and run again for the other.",
        )
    if len(parts) > 2:
        raise QuantOptionError(
            "one of the two sources holds both copies", file=parts[0][0].paths[0]
        )
    return Source(tuple(parts))


def _open(
    source: SourceLike, base: BaseLike | Sequence[BaseLike] | None, copy: str | None
) -> Checkpoint:
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source, base, copy=copy)
    if copy is not None and copy not in source.copies:
        raise PairMismatchError(
            "the copy is not there",
            file=source.paths[0],
            found=f"{', '.join(source.copies)} ({source.copy_reason})",
            needed=copy,
        )
    return source


def check_levels(source: Source, recipe: Recipe, linears: Iterable[tuple[str, str]]) -> None:
    """Raise AlreadyQuantizedError if one of ``linears``, (copy, name) pairs, is below the recipe.

    Looks at each weight by itself: a mixed file's overall level may hide a layer. Warns where
    weights are of the recipe's own class, for they are rounded a second time.
    """
    levels = {
        (copy, name): entry.level
        for checkpoint, copy in source.parts
        for each in (*checkpoint.bases, checkpoint)
        for name, entry in each.entries.get(copy, {}).items()
    }
    found = [(name, levels[copy, name]) for copy, name in linears]
    below = [(name, level) for name, level in found if SOURCE_BITS[level] < recipe.bits]
    if below:
        raise AlreadyQuantizedError(
            f"is already quantized below the level asked for, as are {len(below) - 1} others",
            file=source.paths[0],
            tensor=below[0][0],
            found=below[0][1],
            needed=f"at least {recipe.bits} bits a weight for {recipe.level}",
            hint="Quantize from the BF16 or FP8 files.",
        )
    same = [level for _, level in found if SOURCE_BITS[level] == recipe.bits and level != "FP8"]
    if same:
        _log.warning(
            "%s: %d linears are %s already: writing them as %s rounds them a second time",
            source.paths[0],
            len(same),
            same[0],
            recipe.level,
        )
