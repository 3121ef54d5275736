"""What the steps of a picture take on a card with linears stored this way or that: modelled.

Nothing is measured: it is ``cards.block_seconds``, of which each linear takes its part by its size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..cards.block import FUSED, block_seconds
from ..cards.known import Card
from ..cards.picture import Job, picture_seconds
from ..checkpoint.copy_names import COPIES
from .choose import Linear
from .encodings import Shape
from .errors import QuantOptionError
from .storage import INT4, INT8
from .target_goal import Target

JOB = Job(preset="default")
"""The picture: 1024 x 1024, 512 text tokens, the default preset's steps."""

_INT8 = "INT8 W8A8 rotated"
_SIZES = re.compile(r"layers\.\d+\.(attention\.(qkv|o)|feed_forward\.w[123])$")


def modelled_level(name: str) -> str | None:
    """The level of ``cards`` that a storage runs as; None: no such is modelled."""
    if name == INT4:
        return None
    return _INT8 if name == INT8 else name.partition(" ")[0]


@dataclass(frozen=True)
class Times:
    """``fixed`` seconds of a picture's steps if every linear were INT8, and what each storage of a
    linear takes more (or, below 0, less) than that."""

    fixed: float
    more: Mapping[Linear, Mapping[str, float]]

    def of(self, chosen: Mapping[Linear, str]) -> float:
        """Seconds of a picture's steps."""
        return self.fixed + sum(self.more[key][name] for key, name in chosen.items())


def times(card: Card, offered: Mapping[Linear, Mapping[str, object]],
          shapes: Mapping[Linear, Shape]) -> Times:  # fmt: skip
    """Of the storages that are ``offered`` for each linear and modelled.

    A file of one level takes what ``block_seconds`` says of it. Both copies run in every step; of a
    single copy only its own part is counted.
    """
    tokens = dict(zip(COPIES, JOB.copies, strict=True))
    levels = {n: modelled_level(n) for each in offered.values() for n in each}
    levels = {n: level for n, level in levels.items() if level is not None}
    copies = {copy for copy, _ in shapes}
    one = {
        (copy, name): block_seconds(card, level, tokens[copy], FUSED).total
        for copy in copies
        for name, level in levels.items()
    }
    int8 = {copy: block_seconds(card, _INT8, tokens[copy], FUSED).total for copy in copies}
    whole: dict[tuple[str, str], int] = {}
    for (copy, module), shape in shapes.items():
        if _SIZES.match(module):
            block = copy, module.split(".")[1]
            whole[block] = whole.get(block, 0) + shape[0] * shape[1]
    more: dict[Linear, dict[str, float]] = {}
    for (copy, module), names in offered.items():
        shape, share = shapes[copy, module], 0.0
        if _SIZES.match(module):  # modulation is one row, and what is outside the blocks the same
            share = shape[0] * shape[1] / whole[copy, module.split(".")[1]]
        more[copy, module] = {
            n: JOB.steps * share * (one[copy, n] - int8[copy]) for n in names if n in levels
        }
    picture = picture_seconds(card, _INT8, JOB)
    blocks = {block[0]: 0 for block in whole}
    for copy, _ in whole:
        blocks[copy] += 1
    steps = sum(JOB.steps * count * int8[copy] for copy, count in blocks.items())
    return Times(picture.stem + picture.guidance + steps, more)


def check_seconds(target: Target, found: Times) -> None:
    """QuantOptionError where the fastest of every linear takes longer."""
    least = found.fixed + sum(min(each.values()) for each in found.more.values())
    if target.seconds < least:
        raise QuantOptionError(
            "no storage of these linears is as fast as that",
            found=target.said,
            needed=f"at least {least:.3g} s for the {JOB.steps} steps of a picture of "
            f"{JOB.width} x {JOB.height} (modelled, not measured)",
        )
