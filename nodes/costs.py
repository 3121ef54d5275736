"""What a choice costs, in figures measured on the pocket model.

They lie in costs.json, which ``benchmarks/bench_choices.py --write`` makes; nothing here is
modelled, and nothing was measured on a GPU.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ..quant.tables import in_words

_NAMES = {"w8a8": "W8A8", "dense": "16-bit"}
_OTHER = {"w8a8": "dense", "dense": "w8a8"}


@cache
def figures() -> dict:
    """``choices``: name -> sqnr (dB to BF16), words, time; ``linear``: level -> time ratio."""
    return json.loads(Path(__file__).with_name("costs.json").read_text(encoding="utf-8"))


def gguf_compute(level: str, compute: str, *, details: bool = False) -> str:
    """What it means that a GGUF level is computed as ``w8a8`` or ``dense``; details: against the
    other, and what was timed."""
    other = _OTHER[compute]
    if level not in figures()["linear"]:
        return f"computed as {_NAMES[compute]}: what that costs {level} has not been measured"
    measured = figures()["choices"]
    near = measured[f"{level} {compute}"]["sqnr"]
    line = f"computed as {_NAMES[compute]}: {in_words(near)} to BF16 on the pocket model "
    if not details:
        return f"{line}({near} dB of latent SQNR)"
    times = [figures()["linear"][level], measured[f"{level} w8a8"]["time"]]  # of W8A8 to 16-bit
    linear, pocket = times if compute == "w8a8" else [round(1 / time, 2) for time in times]
    other_near = measured[f"{level} {other}"]["sqnr"]
    return (
        f"{line}({near} dB of latent SQNR; as {_NAMES[other]} {other_near} dB); time on a CPU "
        f"{linear} x that of {_NAMES[other]} for a linear of the real size, {pocket} x for the "
        "pocket model, which is too small for int8; unmeasured on a GPU"
    )


def without_guidance(*, details: bool) -> str:
    """What leaving the unconditional copy out costs, and what it saves."""
    if not details:
        return "half the memory and passes, but the caption is followed less closely"
    time = figures()["choices"]["conditional alone"]["time"]
    return (
        f"half the memory and half the passes ({time} x the time on the pocket model, on a CPU); "
        "the caption is followed less closely, by how much has not been measured: the pocket "
        "model's copies are scaled for guidance, so it cannot tell"
    )
