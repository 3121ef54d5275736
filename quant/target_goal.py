"""What is asked for in the place of a level: bytes, a card to fit into, or seconds on a card.

Importing it imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import QuantOptionError

_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?GB")


@dataclass(frozen=True)
class Target:
    """``nbytes`` for all files together; ``seconds`` for the steps of a picture on ``card``.

    ``said``: as the user put it; ``name``: the part of a file's name that says so.
    """

    nbytes: int
    said: str
    name: str
    seconds: float | None = None
    card: str | None = None


def target_gb(gigabytes: float, option: str = "--target-gb") -> Target:
    """``10.4``: of 10^9 bytes. Raises QuantOptionError."""
    if not 0 < gigabytes < 1e6:  # false of NaN too
        raise QuantOptionError(option, found=gigabytes, needed="above 0")
    return Target(int(gigabytes * 1e9), f"{gigabytes:g} GB", f"{gigabytes:g}GB")


def target_memory(text: str) -> Target:
    """``24GB``: what such a card holds beside the memory that a pass works in."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise QuantOptionError("--fit", found=text, needed="as 24GB")
    from ..checkpoint.pairs import WORKING_MEMORY

    said = f"{float(match[1]):g}GB"
    nbytes = int(float(match[1]) * 1e9) - WORKING_MEMORY
    if nbytes <= 0:
        raise QuantOptionError(
            "--fit",
            found=text,
            needed=f"more than the {WORKING_MEMORY / 1e9:g} GB that a pass takes",
        )
    return Target(nbytes, f"a card of {text.strip()}", f"fit{said}")


def target_seconds(seconds: float, card: str | None) -> Target:
    """``20`` on ``"RTX 3090"``: and no more bytes than that card holds beside screens and work."""
    if not 0 < seconds < math.inf:
        raise QuantOptionError("--target-seconds", found=seconds, needed="above 0")
    from ..cards.known import CARDS, find
    from ..cards.picture import DESKTOP
    from ..checkpoint.pairs import WORKING_MEMORY

    known = None if card is None else find(card)
    if known is None:
        raise QuantOptionError(
            "--target-seconds needs a card that is modelled",
            found="none" if card is None else f"--card {card!r}",
            needed="--card with one of " + ", ".join(each.name for each in CARDS),
        )
    nbytes = known.memory - DESKTOP - WORKING_MEMORY
    said = f"{seconds:g} s on an {known.name} (modelled)"
    return Target(nbytes, said, f"in{seconds:g}s", seconds, known.name)
