"""The process that measures: takes one stage after another, sends rows and how each ended."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from .document import FAILED, OK, PARTLY

ENDED, ROW, READY = "ended", "row", "ready"

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A stage to run: where its function is, its seconds, and what earlier stages found.

    ``folder``: where measured choices lie until the run ends; never part of the file.
    """

    package: str
    function: str
    seconds: float
    reduced: bool
    ceilings: Mapping[str, float]
    folder: str = ""


@dataclass
class Context:
    """What a stage is handed. ``ceilings``: operations or bytes a second by name.

    A stage calls ``late()`` between two measurements and stops where it says yes; then it counts as
    done in part, with ``missing`` saying what of it, as it does with ``remarks`` of its own.
    """

    device: str | None
    reduced: bool
    deadline: float  # of time.perf_counter
    ceilings: Mapping[str, float] = field(default_factory=dict)
    folder: str = ""
    missing: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline, not below 0."""
        return max(0.0, self.deadline - time.perf_counter())

    def late(self, what: str = "") -> bool:
        """Whether the time is over; ``what`` is then noted as not measured."""
        over = time.perf_counter() >= self.deadline
        if over and what:
            self.missing.append(what)
        return over


def serve(connection: Connection, device: str | None) -> None:
    """Answer requests until the other side is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send((READY, None))
    while True:
        try:
            request: Request = connection.recv()
        except (EOFError, OSError):
            return
        context = Context(
            device,
            request.reduced,
            time.perf_counter() + request.seconds,
            request.ceilings,
            request.folder,
        )
        try:
            for row in _rows(request, context):
                connection.send((ROW, row))
            connection.send((ENDED, _end(context)))
        except Exception as error:  # whatever compilers, drivers and extensions come up with
            connection.send((ENDED, (FAILED, describe(error))))


def _rows(request: Request, context: Context) -> Iterator[Row]:
    module, _, name = request.function.partition(":")
    stage = getattr(importlib.import_module(f".{module}", request.package), name)
    return stage(context)


def _end(context: Context) -> tuple[str, str]:
    missing = [f"not measured: {', '.join(context.missing)}"] if context.missing else []
    note = "; ".join((*context.remarks, *missing))
    return (PARTLY if note else OK), note


def describe(error: BaseException) -> str:
    """The error as one line of the file."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _end_with_parent() -> None:
    """A run that was killed must not leave a process that works the card."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
