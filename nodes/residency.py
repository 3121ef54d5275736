"""Which copies stay on the device while a picture is made.

Both copies are asked for by one request where both fit. Where only one does, they take turns, and
every second step runs them in the other order: a step then ends with the copy that the next one
begins with, which halves the moves. Where not even one fits, the host streams weights as it does
for any model. Not measured on a GPU.
"""

from __future__ import annotations

AUTO, BOTH, ALTERNATING = "auto", "both", "alternating"
CHOICES = (AUTO, BOTH, ALTERNATING)


def choose(asked: str, sizes: tuple[int, int], working: int, memory: int) -> str:
    """``both`` or ``alternating``.

    asked: one of CHOICES. sizes: bytes of the two copies. working: bytes that one pass needs beside
    them. memory: bytes of the device.
    """
    if asked != AUTO:
        return asked
    if sum(sizes) + working <= memory or max(sizes) + working > memory:
        return BOTH  # everything fits, or nothing does and the host streams
    return ALTERNATING
