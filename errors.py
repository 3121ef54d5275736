"""Typed errors: each names the file, the tensor, what was found, what is needed, what to do."""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any

DOWNLOAD_AGAIN = "The file is incomplete or damaged: download it again."
"""Hint for a file that ends early or whose header is garbled."""
CHECK_DOWNLOAD = (
    "If its size and SHA-256 (ideogram4-quant doctor --sha256) are not those of its page, download "
    "it again; if they are, the tool that wrote it made it so: use another file."
)
"""Hint for a whole file whose parts do not go together."""

_LONGEST = 300  # characters of what a file says of itself, such as a tensor's name


def printable(text: str, longest: int = _LONGEST) -> str:
    """``text`` cut to a readable length, in characters that every log and terminal can show.

    Names come from files, so from anyone: control characters would steer a terminal, and halves of
    surrogate pairs cannot be encoded.
    """
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Ideogram4QuantError(Exception):
    """Base of every error the pack raises on purpose.

    The message reads ``FILE: tensor NAME: MESSAGE (found X, needed Y). HINT`` with the parts that
    are given, each made :func:`printable`; they stay available as attributes.

    Every class shows as ``ideogram4_quant.NAME``: ComfyUI prints a class with its module, and names
    the modules of custom nodes by their paths on the disk.
    """

    _home = __name__  # the module that a class can be imported from

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._home, cls.__module__ = cls.__module__, _SHOWN_AS

    def __reduce__(self) -> tuple:
        return _unpickled, (self._home, type(self).__qualname__, self.args, self.__dict__)

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

    def with_hint(self, hint: str) -> Ideogram4QuantError:
        """This very error, saying something else to do about it."""
        self.hint = hint
        self.args = (self._render(), *self.args[1:])
        return self

    def _render(self) -> str:
        parts = []
        if self.file is not None:
            parts.append(f"{printable(self.file, 1 << 12)}: ")
        if self.tensor is not None:
            parts.append(f"tensor {printable(self.tensor)}: ")
        parts.append(printable(self.message.rstrip("."), 4 * _LONGEST))
        details = []
        if self.found is not None:
            details.append(f"found {printable(str(self.found), 4 * _LONGEST)}")
        if self.needed is not None:
            details.append(f"needed {printable(str(self.needed), 4 * _LONGEST)}")
        if details:
            parts.append(f" ({', '.join(details)})")
        parts.append(".")
        if self.hint:
            parts.append(f" {self.hint}")
        return "".join(parts)


_SHOWN_AS = "ideogram4_quant"
Ideogram4QuantError.__module__ = _SHOWN_AS


def _unpickled(home: str, name: str, args: tuple, said: dict[str, Any]) -> Ideogram4QuantError:
    """An error of another process, which Python cannot find under the name that it shows."""
    kind = getattr(importlib.import_module(home), name)
    error = kind.__new__(kind, *args)
    error.__dict__.update(said)
    return error


class OpError(Ideogram4QuantError, ValueError):
    """A shape, dtype, device or option that an op cannot take."""


class ArgumentTypeError(Ideogram4QuantError, TypeError):
    """An argument of a public function that is of a wrong type; the message names the argument."""


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
