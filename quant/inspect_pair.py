"""Two files as the copies of one model: whether they are, and what both take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import check_pair, open_checkpoint
from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.pairs import levels_of
from .inspect import Inspection, inspect_file
from .source import BaseLike
from .tables import human_bytes


@dataclass(frozen=True)
class PairInspection:
    """Both files; ``level`` of two levels is ``INT8 W8A8 rotated + Q4_K``, the conditional copy's
    first. ``weight_bytes``: of the conditional and of the unconditional copy."""

    level: str
    weight_bytes: tuple[int, int]
    conditional: Inspection
    unconditional: Inspection

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "level": self.level,
            "weight_bytes": list(self.weight_bytes),
            CONDITIONAL: self.conditional.to_dict(),
            UNCONDITIONAL: self.unconditional.to_dict(),
        }

    def table(self) -> str:
        """Both tables, and a line for the pair."""
        first, second = map(human_bytes, self.weight_bytes)
        both = human_bytes(sum(self.weight_bytes))
        line = f"pair: {self.level}, {first} + {second} = {both} of weights"
        return "\n\n".join((self.conditional.table(), self.unconditional.table(), line))


def inspect_pair(
    conditional: str | os.PathLike[str],
    unconditional: str | os.PathLike[str],
    base: BaseLike | Sequence[BaseLike] | None = None,
) -> PairInspection:
    """What `inspect_file` finds of both. PairMismatchError for two files that are no pair."""
    first = open_checkpoint(conditional, base, copy=CONDITIONAL)
    second = open_checkpoint(unconditional, base, copy=UNCONDITIONAL)
    check_pair(first, second)
    return PairInspection(
        " + ".join(levels_of(first.level, second.level)),
        (first.size // len(first.copies), second.size // len(second.copies)),
        inspect_file(conditional, base),
        inspect_file(unconditional, base),
    )
