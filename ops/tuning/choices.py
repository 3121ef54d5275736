"""What was measured on a device of this process, and what ``"auto"`` makes of it.

Only facts about devices live here, put in by ``autotune`` when a model is loaded. Reading them is a
look-up: nothing is measured, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

TOKEN_STEP = 512
"""Token counts are rounded up to a multiple of this: GEMMs of one bucket take one choice."""

LINEAR, GGUF, ATTENTION = "int8_linear", "gguf_linear", "attention"
FUSED, ROPE, TILE = "fused_linear", "rms_rope", "int8_tile"
ROWS, VALUES = "rows", "values"
"""Candidates of FUSED: the input made as int8 rows, or as values for the fastest whole linear."""

ALWAYS_DENSE = 1 << 62
"""``few_tokens`` of a layer that int8 makes slower at every token count."""


@dataclass(frozen=True)
class Key:
    """What a measurement is of.

    ``op``: LINEAR and GGUF, a weight ``[n, k]`` on ``tokens`` rows; ATTENTION, ``n`` heads of ``k``
    values over ``tokens``, and ROPE the norms and rotary embedding before it; FUSED, as LINEAR and
    with what makes the input. ``detail``: the rotation group of LINEAR (``"0"``: none), the format
    of GGUF, input and rotation of FUSED, the class of shapes of TILE (a LINEAR's), else empty.
    """

    op: str
    n: int
    k: int
    tokens: int
    dtype: str
    detail: str = ""

    def __str__(self) -> str:
        if self.op in (ATTENTION, ROPE):
            name = "q and k norms and rotary embedding" if self.op == ROPE else self.op
            return f"{name}, {self.n} heads of {self.k}, {self.tokens} tokens, {self.dtype}"
        if self.op == FUSED:
            name, kind = "fused int8 linear", self.detail
        elif self.op == TILE:
            name, kind = "tiles of the int8 product", self.detail
        elif self.op == LINEAR:
            name, kind = "int8 linear", "" if self.detail == "0" else f"rotated by {self.detail}"
        else:
            name, kind = "GGUF linear", self.detail
        parts = (f"{name} {self.k} -> {self.n}", f"{self.tokens} tokens", self.dtype, kind)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Measurement:
    """Seconds of each candidate, and where they differ in it, their relative errors.

    estimated: candidates that were timed on fewer rows alone, far behind the others: their seconds
    are these times scaled up, and no measurement.
    """

    key: Key
    seconds: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    estimated: frozenset[str] = frozenset()

    @property
    def ranking(self) -> tuple[str, ...]:
        """The candidates from the fastest to the slowest."""
        return tuple(sorted(self.seconds, key=self.seconds.__getitem__))

    def __str__(self) -> str:
        figures = (self._figure(name) for name in self.ranking)
        errors = (f"{name} {self.errors[name]:.1e}" for name in self.ranking if name in self.errors)
        line = f"{self.key}: {', '.join(figures)}"
        return f"{line}; relative error: {', '.join(errors)}" if self.errors else line

    def _figure(self, name: str) -> str:
        if name in self.estimated:
            return f"{name} far behind, not measured at this size"
        return f"{name} {_milliseconds(self.seconds[name])}"


class Table:
    """The measurements of one device."""

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self._entries = {m.key: m for m in measurements}
        self._found: dict[tuple, Measurement | tuple | int | None] = {}

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Measurement | None:
        """The measurement of exactly ``key``."""
        return self._entries.get(key)

    def with_added(self, measurements: Iterable[Measurement]) -> Table:
        """A table of both; the new ones replace older ones of the same key."""
        return Table([*self, *measurements])

    def nearest(
        self, op: str, n: int, k: int, tokens: int, dtype: str | None, detail: str | None
    ) -> Measurement | None:
        """The measurement of that weight whose token count is nearest, by ratio; None without one.

        ``tokens`` is rounded up to TOKEN_STEP. A dtype or detail of None takes any.
        """
        bucket = rounded(tokens)
        wanted = (op, n, k, bucket, dtype, detail)
        if wanted not in self._found:
            fitting = [
                m
                for m in self
                if (m.key.op, m.key.n, m.key.k) == (op, n, k)
                and dtype in (None, m.key.dtype)
                and detail in (None, m.key.detail)
            ]
            distance = lambda m: abs(math.log(m.key.tokens / bucket))
            self._found[wanted] = min(fitting, key=distance, default=None)
        return self._found[wanted]

    def few_tokens(self, qtype: str, n: int, k: int, dtype: str | None) -> int | None:
        """From how many tokens on int8 is faster than decoding for a GGUF weight ``[n, k]``.

        ALWAYS_DENSE where it is at no measured count, None where none was measured.
        """
        wanted = (GGUF, n, k, 0, dtype, qtype)
        if wanted not in self._found:
            fitting = [
                m
                for m in self
                if (m.key.op, m.key.n, m.key.k, m.key.detail) == (GGUF, n, k, qtype)
                and dtype in (None, m.key.dtype)
            ]
            self._found[wanted] = _crossover(fitting)
        return self._found[wanted]

    def where_rows_pay(
        self, n: int, k: int, dtype: str | None, detail: str
    ) -> tuple[tuple[float, bool], ...]:
        """``(up to so many tokens, whether)`` rows beat values for the FUSED ``[n, k]``, in order.

        Counts between two measured ones go with the nearest, by ratio. Empty where nothing was
        measured.
        """
        wanted = (FUSED, n, k, 0, dtype, detail)
        if wanted not in self._found:
            of = (FUSED, n, k, dtype, detail)
            fitting = [
                m for m in self if (m.key.op, m.key.n, m.key.k, m.key.dtype, m.key.detail) == of
            ]
            fitting.sort(key=lambda m: m.key.tokens)
            counts = [m.key.tokens for m in fitting]
            ends = [math.isqrt(a * b) // TOKEN_STEP * TOKEN_STEP for a, b in pairwise(counts)]
            faster = [m.ranking[0] == ROWS for m in fitting]
            self._found[wanted] = tuple(zip([*ends, math.inf][: len(counts)], faster, strict=True))
        return self._found[wanted]


_TABLES: dict[torch.device, Table] = {}


def table(device: torch.device | str) -> Table:
    """What this process knows about ``device``; empty before a model was loaded."""
    return _TABLES.get(named(device)) or Table()


def remember(device: torch.device | str, measured: Table) -> None:
    """Take over the measurements of a device; ``autotune`` calls this."""
    _TABLES[named(device)] = measured


def rounded(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of TOKEN_STEP, at least one of them."""
    return max(1, -(-tokens // TOKEN_STEP)) * TOKEN_STEP


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``"bfloat16"`` for ``torch.bfloat16``; None stays None."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def named(device: torch.device | str) -> torch.device:
    """With its index: ``cuda`` and ``cuda:0`` may be one device, ``cuda:1`` is another."""
    device = torch.device(device)
    module = getattr(torch, device.type, None) if device.type in ("cuda", "xpu") else None
    if device.index is None and module is not None and module.is_available():
        return torch.device(device.type, module.current_device())
    return device


def _crossover(measured: list[Measurement]) -> int | None:
    if not measured:
        return None
    few = ALWAYS_DENSE
    for m in sorted(measured, key=lambda m: -m.key.tokens):
        if m.ranking[0] != "w8a8":
            break
        few = m.key.tokens
    return few


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
