"""Asking once what a device can do, and again where the answer was a passing one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# What libraries say of a moment without memory, in errors of many kinds.
_NO_MEMORY = (
    "memoryerror",
    "out of memory",
    "alloc_failed",
    "not enough memory",
    "can't allocate memory",
)


class PassingFailure(Exception, Generic[T]):
    """Raised by a probe whose ``answer`` holds for now alone: it is given, and not kept."""

    def __init__(self, answer: T) -> None:
        super().__init__(answer)
        self.answer = answer


def is_passing(reason: str) -> bool:
    """Whether another try may succeed: memory was short, which says nothing of the device."""
    return any(words in reason.lower() for words in _NO_MEMORY)


def checked(answer: T, reason: str) -> T:
    """``answer``, for a probe to return and to be kept; PassingFailure where memory was short."""
    if is_passing(reason):
        raise PassingFailure(answer)
    return answer


def kept(probe: Callable[..., T]) -> Callable[..., T]:
    """``probe``, asked once for each device; what it raises as a PassingFailure is asked again.

    ``cache_clear()`` forgets the answers.
    """
    cached = functools.cache(probe)

    @functools.wraps(probe)
    def ask(*arguments: Any) -> T:
        try:
            return cached(*arguments)
        except PassingFailure as failure:
            return failure.answer

    ask.cache_clear = cached.cache_clear
    return ask
