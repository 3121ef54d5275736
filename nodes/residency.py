"""Which copies stay on the device while a picture is made.

Both copies are asked for by one request where both fit. Where only one does, they take turns, and
every second step runs them in the other order: a step then ends with the copy that the next one
begins with, which halves the moves. Where not even one fits, both stay in RAM and the host streams
their weights layer by layer. The order of loads is tested; what each costs on a GPU is unmeasured.
"""

from __future__ import annotations

from ..checkpoint.levels import ALTERNATING, AUTO, BOTH, STREAMED, residency

CHOICES = (AUTO, BOTH, ALTERNATING, STREAMED)


def choose(asked: str, sizes: tuple[int, int], working: int, memory: int) -> str:
    """``both``, ``alternating`` or ``streamed``.

    asked: one of CHOICES. sizes: bytes of the two copies. working: bytes that one pass needs beside
    them. memory: bytes of the device.
    """
    return residency(sizes, memory, working) if asked == AUTO else asked
