"""Copies that run beside a device's work: streams and events, and a CPU's stand-in for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future

import torch
from torch import Tensor


class Lane(ABC):
    """How fetches run beside the work of a device. A mark is what others can wait for."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Tensor | None:
        """uint8 [nbytes] of pinned memory; None where the system gives none."""

    @abstractmethod
    def fetch(self, index: int, after: object, copy: Callable[[], None]) -> object:
        """Run ``copy`` beside the work, once ``after`` is reached; the mark of its end."""

    @abstractmethod
    def wait(self, index: int, fetched: object) -> None:
        """The work waits for the mark."""

    @abstractmethod
    def done(self, index: int | None) -> object:
        """The mark of all work so far, block ``index`` the last of it (None: no block yet)."""

    @abstractmethod
    def finish(self, mark: object) -> None:
        """The caller itself waits until the mark is reached."""


class DeviceLane(Lane):
    """A stream for copies on a device that has streams (``torch.cuda``, ``torch.xpu``)."""

    def __init__(self, device: torch.device, pins: bool = True):
        self.device, self.pins = device, pins
        self.api = getattr(torch, device.type)
        with self.api.device(device):
            self.stream = self.api.Stream()

    def pinned(self, nbytes: int) -> Tensor | None:
        if not self.pins:
            return None
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return None

    def fetch(self, index: int, after: object, copy: Callable[[], None]) -> object:
        with self.api.device(self.device), self.api.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            copy()
            return self.stream.record_event()

    def wait(self, index: int, fetched: object) -> None:
        self.api.current_stream(self.device).wait_event(fetched)

    def done(self, index: int | None) -> object:
        return self.api.current_stream(self.device).record_event()

    def finish(self, mark: object) -> None:
        mark.synchronize()


class HostLane(Lane):
    """No streams: everything happens at once, and ``events`` says in which order it was asked for.

    An event is ``(what, block, after)``: ``("fetch", 2, 0)`` may begin when block 0 has run,
    ``("run", 2, 2)`` when fetch 2 has come; None waits for nothing.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int | None]] = []

    def pinned(self, nbytes: int) -> Tensor | None:
        return torch.empty(nbytes, dtype=torch.uint8)

    def fetch(self, index: int, after: object, copy: Callable[[], None]) -> object:
        self.events.append(("fetch", index, after))
        copy()
        return index

    def wait(self, index: int, fetched: object) -> None:
        self.events.append(("run", index, fetched))

    def done(self, index: int | None) -> object:
        return index

    def finish(self, mark: object) -> None:
        pass


class Inline(Executor):
    """Runs what it is given at once."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future
