"""Arguments against the annotations of a function, so that a wrong type names its argument."""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ArgumentTypeError


def types_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> what its annotation stands for."""
    return get_type_hints(function, localns=_for_checkers_only())


def _for_checkers_only() -> dict[str, Any]:
    """Names that modules import for type checkers alone."""
    from .checkpoint import Checkpoint

    return {"Checkpoint": Checkpoint}


def check_arguments(
    function: str,
    signature: inspect.Signature,
    wanted: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """ArgumentTypeError for the first argument of a wrong type, for one too many and for one that
    is missing or unknown."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentTypeError(f"{function}: {error}") from error
    for name, value in bound.arguments.items():
        if name in wanted and not fits(value, wanted[name]):
            raise ArgumentTypeError(
                f"{function}: {name} is of a wrong type",
                found=f"{type(value).__name__} {value!r:.80}",
                needed=_named(wanted[name]),
            )


def _named(wanted: Any) -> str:
    """The type for readers: aliases spelled out."""
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)


def fits(value: object, wanted: Any) -> bool:
    """Whether ``value`` is of the annotated type; items of short sequences are looked at too.

    A bool is no int here, and a str no sequence of str.
    """
    origin, parts = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True
    if wanted is None or wanted is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None and issubclass(origin, collections.abc.Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, origin):
            return False
        return not parts or all(fits(item, parts[0]) for item in value)
    kind = origin or wanted
    if kind is float:
        kind = (int, float)
    if not isinstance(kind, type | tuple):
        return True
    return isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, (int, float)))
