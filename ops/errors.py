"""Typed errors: each names the file, the tensor, what was found, what is needed, what to do."""

from __future__ import annotations

from os import PathLike


class Ideogram4QuantError(Exception):
    """Base of every error the pack raises on purpose.

    The message reads ``FILE: tensor NAME: MESSAGE (found X, needed Y). HINT`` with the parts that
    are given; they stay available as attributes.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
        found: object = None,
        needed: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.found = found
        self.needed = needed
        self.hint = hint
        super().__init__(self._render())

    def _render(self) -> str:
        parts = []
        if self.file is not None:
            parts.append(f"{self.file}: ")
        if self.tensor is not None:
            parts.append(f"tensor {self.tensor}: ")
        parts.append(self.message.rstrip("."))
        details = []
        if self.found is not None:
            details.append(f"found {self.found}")
        if self.needed is not None:
            details.append(f"needed {self.needed}")
        if details:
            parts.append(f" ({', '.join(details)})")
        parts.append(".")
        if self.hint:
            parts.append(f" {self.hint}")
        return "".join(parts)


class OpError(Ideogram4QuantError, ValueError):
    """A shape, dtype, device or option that an op cannot take."""


class BackendUnavailableError(Ideogram4QuantError, RuntimeError):
    """A backend was asked for by name and is not available here; the message says why."""


class CheckpointError(Ideogram4QuantError):
    """A model file that cannot be used as it is."""


class NotIdeogram4Error(CheckpointError):
    """The file holds something else than Ideogram 4 (or than its text encoder)."""


class CorruptFileError(CheckpointError):
    """Offsets, sizes or header fields contradict each other or the file's length."""


class TruncatedFileError(CorruptFileError):
    """The file ends before the data that its header promises: most often a broken download."""


class MissingBaseError(CheckpointError):
    """The file holds only some of the weights, and no base file gives the rest."""


class PairMismatchError(CheckpointError):
    """Two files that do not belong together, such as two conditional copies."""
