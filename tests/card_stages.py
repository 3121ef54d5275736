"""Stages that fail in every way that one can, for the command ``card``: run in its worker."""

from __future__ import annotations

import os
import signal
import time


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


def good(context):
    yield {"what": "ceiling", "ceiling": "int8", "per_second": 5.0}
    yield {"what": "process", "id": os.getpid(), "rate": context.ceilings.get("int8")}


def raising(context):
    yield {"what": "before"}
    raise ValueError("an illegal instruction at /srv/someone/secret/kernel.py:12")


def out_of_memory(context):
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
    yield


def slow_but_polite(context):
    for number in range(1000):
        if context.late(f"part {number}"):
            return
        yield {"what": number}
        time.sleep(0.05)


def hanging(context):
    yield {"what": "before"}
    time.sleep(600)


def aborting(context):
    yield {"what": "before"}
    os.kill(os.getpid(), signal.SIGKILL)


def unimportable(context):
    import no_such_module  # noqa: F401

    yield


def not_finite(context):
    yield {"what": float("nan"), "rate": float("inf")}


def personal(context):
    yield {"text": os.environ["CARD_TEST_TEXT"]}
