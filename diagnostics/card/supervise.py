"""Runs the stages in a process of their own, so that none can take the others with it.

A stage may raise, hang in a compiler, run out of memory, break the device's context or end the
process (LLVM aborts). The worker is replaced after each of these, and the file is whole after each
stage whatever happens, also to this process.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from . import document as documents
from . import worker

TOTAL = 345.0
"""Seconds of a whole run, starts of processes included."""

_STARTS = 60.0  # until torch is imported, at most: a cold disk, a virus scanner
_GRACE = 8.0  # beyond its budget, for what cannot be interrupted (one compilation)
_LEAST = 2.0  # seconds of budget below which a stage is not begun
_SAVED = 2.0  # seconds between two writes within a stage


@dataclass(frozen=True)
class Stage:
    """``function``: ``"module:name"`` of a generator of rows, below ``package``."""

    name: str
    seconds: float
    function: str
    package: str = __package__


class Supervisor:
    """Runs stages one after another and keeps ``document`` up to date by ``save``."""

    def __init__(
        self,
        document: dict[str, Any],
        save: Callable[[], None],
        device: str | None,
        total: float = TOTAL,
        grace: float = _GRACE,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._document, self._save, self._say = document, save, say
        self._device, self._grace = device, grace
        self._deadline = time.monotonic() + total
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._ceilings: dict[str, float] = {}
        self._written = 0.0

    def run(self, stages: Sequence[Stage]) -> None:
        """All stages within the time; ``finished`` is set when none is left to begin."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                self._write()
                for stage, entry in zip(stages, self._document["stages"], strict=True):
                    self._one(stage, entry, folder)
                    self._write()
                    self._say(_line(entry))
                self._document["finished"] = True
                self._write()
            finally:
                self._stop()

    def _one(self, stage: Stage, entry: dict[str, Any], folder: str) -> None:
        reason = self._start()
        left = self._deadline - time.monotonic() - self._grace
        seconds = min(stage.seconds, left)
        if reason is None and seconds < min(_LEAST, stage.seconds):
            reason = "the time of the whole run is over"
        if reason is not None:
            entry["note"] = reason
            return
        entry["status"] = documents.RUNNING
        self._write()
        started = time.monotonic()
        request = worker.Request(
            stage.package,
            stage.function,
            seconds,
            self._document["reduced"],
            self._ceilings,
            folder,
        )
        try:
            self._connection.send(request)
            status, note = self._follow(entry, started + seconds + self._grace)
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            status, note = documents.FAILED, f"the process that measured it ended ({_how(code)})"
        entry["status"], entry["note"] = status, note
        entry["seconds"] = round(time.monotonic() - started, 2)
        if status in (documents.FAILED, documents.STOPPED):
            self._stop()  # what failed may have left the device in a state of its own

    def _follow(self, entry: dict[str, Any], end: float) -> tuple[str, str]:
        """Rows as they come, until the stage says how it ended or its time is over."""
        while self._connection.poll(max(0.0, end - time.monotonic())):
            kind, value = self._connection.recv()
            if kind == worker.ENDED:
                return value
            entry["rows"].append(value)
            self._document["reduced"] |= bool(value.get("reduced"))
            if "ceiling" in value:
                self._ceilings[value["ceiling"]] = value["per_second"]
            if time.monotonic() - self._written > _SAVED:
                self._write()
        return documents.STOPPED, "it did not end within its time"

    def _start(self) -> str | None:
        """A worker that answers; why there is none."""
        if self._process is not None and self._process.is_alive():
            return None
        self._stop()
        left = self._deadline - time.monotonic() - self._grace
        if left < _LEAST:
            return "the time of the whole run is over"
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        # no daemon: those may not start the processes in which torch.compile compiles
        self._process = context.Process(target=worker.serve, args=(other, self._device))
        self._process.start()
        other.close()
        try:
            if self._connection.poll(min(_STARTS, left)):
                self._connection.recv()
                return None
            reason = "the process that measures did not start in time"
        except (EOFError, OSError):
            self._process.join(5)
            reason = f"the process that measures did not start ({_how(self._process.exitcode)})"
        self._stop()
        return reason

    def _stop(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join(5)  # one that a driver holds cannot be waited for
        self._process = self._connection = None

    def _write(self) -> None:
        self._save()
        self._written = time.monotonic()


def _how(code: int | None) -> str:
    if code is None:
        return "no exit code"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _line(entry: dict[str, Any]) -> str:
    note = f": {entry['note']}" if entry["note"] else ""
    text = f"{entry['status']:<8} {entry['name']:<12} {entry['seconds']:>6.1f} s"
    return f"{text}, {len(entry['rows'])} rows{note}"
