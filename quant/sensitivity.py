"""How much of an error in a linear's output arrives in the picture: the gain of every linear.

The gain of a linear is the relative error energy of the final latents for a relative error energy
of one in its outputs, to first order; errors of different linears add as if independent
(docs/error-sources.md). A rounded weight errs alike at every token and step, inputs rounded to 8
bits do not, and those rounded to 4 are between: each has a gain of its own.
``engine.sensitivity`` measures gains; without a measurement those of the pocket model stand in, by
kind of linear and copy.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.copy_names import CONDITIONAL
from ..files.new_file import check_output, replaced
from ..sampling.presets import MAIN_GUIDANCE
from .choose import Linear
from .errors import CalibrationError

FORMAT = "ideogram4-quant sensitivity"
VERSION = 2
_MAX_BYTES = 32 << 20
_MAX_LINEARS = 10_000
_MOST_LOG = 600.0  # a double's exponent


class Loss(NamedTuple):
    """Relative error energy of a linear's outputs: by its rounded weight, by inputs rounded to 8
    bits, by inputs rounded to 4."""

    weight: float
    int8: float = 0.0
    int4: float = 0.0


class Gain(NamedTuple):
    """What of a :class:`Loss` arrives in the final latents, for 1 of each."""

    weight: float
    int8: float
    int4: float

    def of(self, loss: Loss) -> float:
        """Relative error energy of the final latents."""
        return sum(gain * lost for gain, lost in zip(self, loss, strict=True))


DEFAULT_LAYERS = 4
"""Transformer blocks of the model that :data:`DEFAULT_GAINS` were measured on."""

# The conditional copy's, of the pocket model. Of weights: each linear quantized alone to calibrated
# W4A8, the relative error energy of the final latents over that of its outputs, geometric means
# over blocks (16 held-out captions, default preset). Of inputs: as much less as ``sensitivity``
# finds. First match wins; linears outside the blocks count as w1.
DEFAULT_GAINS: tuple[tuple[str, Gain], ...] = (
    ("*.feed_forward.w2", Gain(2.5, 0.19, 0.74)),
    ("*.feed_forward.w3", Gain(0.025, 0.0019, 0.0043)),
    ("*.attention.o", Gain(0.2, 0.0076, 0.02)),
    ("*.attention.qkv", Gain(0.0045, 0.0026, 0.0073)),
    ("*.adaln_modulation", Gain(0.04, 0.0096, 0.024)),
    ("*", Gain(0.12, 0.0091, 0.019)),
)
"""Gains by kind of linear in the conditional copy, for a model that was not measured."""

UNCONDITIONAL_SHARE = ((MAIN_GUIDANCE - 1) / MAIN_GUIDANCE) ** 2
"""What of a conditional gain the same linear of the other copy has: guidance adds the errors of
both as ``g`` and ``g - 1``, and both copies are hurt alike (docs/pairs.md). The pocket model's own
share is 0.03 to 0.12: the scale that its copies are exported with, which no other model has."""


class Part(NamedTuple):
    """Of one kind of error of a linear: natural logarithms of the energy that ``log_arrived`` in
    pictures' final latents, relative to theirs, and the ``error`` energy of its outputs: sums."""

    log_arrived: float = 0.0
    error: float = 0.0


_NONE = Part()


@dataclass(frozen=True)
class Sums:
    """What was summed of one linear over ``pictures``: ``signal``, the energy of its outputs, and a
    part for each kind of error of a :class:`Loss`."""

    pictures: int = 0
    signal: float = 0.0
    weight: Part = _NONE
    int8: Part = _NONE
    int4: Part = _NONE

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums.of([a + b for a, b in zip(self.flat(), other.flat(), strict=True)])

    def flat(self) -> list[float]:
        """As numbers, in their order."""
        return [self.pictures, self.signal, *self.weight, *self.int8, *self.int4]

    @classmethod
    def of(cls, flat: Sequence[float]) -> Sums:
        """Of what :meth:`flat` gives."""
        pictures, signal, *rest = flat
        return cls(pictures, signal, *map(Part, rest[::2], rest[1::2]))

    @property
    def gain(self) -> Gain:
        """Relative error energy that arrives, for one of 1 in the outputs; 0 for no error.

        Of the typical picture: a mean of logarithms, as a mean of decibels is. A few pictures are
        near to becoming others, and would be most of a mean of energies.
        """
        return Gain(*map(self._gain, (self.weight, self.int8, self.int4)))

    def _gain(self, part: Part) -> float:
        if not part.error:
            return 0.0
        return math.exp(part.log_arrived / self.pictures) * self.signal / part.error


@dataclass(frozen=True)
class Sensitivity:
    """``linears``: ``conditional.layers.0.attention.qkv`` -> what was summed.

    ``models``: copy -> SHA-256 of its file; ``settings``: what was sampled; ``done``: names of the
    pictures that are in it, so that a run which was broken off goes on.
    """

    linears: Mapping[str, Sums]
    models: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)
    done: tuple[str, ...] = ()
    path: Path | None = None

    def gain(self, copy: str, module: str) -> Gain | None:
        """The gain of a linear; None if it was not measured."""
        sums = self.linears.get(f"{copy}.{module}")
        return None if sums is None else sums.gain

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write it as JSON, whole or not at all. Raises WriteError, OutputExistsError."""
        target = check_output(path, overwrite=overwrite)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "models": dict(self.models),
            "settings": dict(self.settings),
            "done": list(self.done),
            "linears": {key: sums.flat() for key, sums in self.linears.items()},
        }
        with replaced(target) as file:
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read and check a file of :meth:`save`. Raises CalibrationError."""
        path = Path(path)
        record = _record(path)
        linears = {key: _sums(path, key, entry) for key, entry in record["linears"].items()}
        return cls(linears, record["models"], record["settings"], tuple(record["done"]), path)


def default_gain(copy: str, module: str, layers: int) -> Gain:
    """The pocket model's gain for this kind of linear, the unconditional copy's by its part in
    guidance; a block's share falls with their number."""
    found = next(gain for pattern, gain in DEFAULT_GAINS if fnmatchcase(module, pattern))
    share = 1.0 if copy == CONDITIONAL else UNCONDITIONAL_SHARE
    share *= DEFAULT_LAYERS / max(layers, 1)
    return Gain(*(gain * share for gain in found))


def gains_of(
    sensitivity: Sensitivity | None, linears: list[Linear], digests: Mapping[str, str]
) -> dict[Linear, Gain]:
    """The gain of each of ``linears``: measured, or the pocket model's without a measurement.

    ``digests``: copy -> SHA-256 of the files to quantize. Raises CalibrationError for a measurement
    of another model, or one that lacks a linear.
    """
    if sensitivity is None:
        layers = len({found[1] for _, m in linears if (found := re.match(r"layers\.(\d+)\.", m))})
        return {linear: default_gain(*linear, layers) for linear in linears}
    for copy, digest in digests.items():
        known = sensitivity.models.get(copy)
        if known != digest:
            raise CalibrationError(
                f"sensitivities of another model: the {copy} copy differs",
                file=sensitivity.path,
                found="none" if known is None else f"sha256 {known}"[:80],
                needed=f"sha256 {digest}",
                hint="Measure this model (ideogram4-quant sensitivity), or leave --sensitivity out "
                "for the built-in table.",
            )
    found = {}
    for copy, module in linears:
        gain = sensitivity.gain(copy, module)
        if gain is None:
            raise CalibrationError(
                "no sensitivity of a linear", file=sensitivity.path, tensor=f"{copy}.{module}"
            )
        found[copy, module] = gain
    return found


def _record(path: Path) -> dict[str, object]:
    def bad(what: str, found: object, needed: object) -> CalibrationError:
        return CalibrationError(
            what,
            file=path,
            found=found,
            needed=needed,
            hint="Make one with ideogram4-quant sensitivity.",
        )

    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise bad("too large for a file of sensitivities", size, f"at most {_MAX_BYTES} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad(f"cannot be read: {error.strerror or error}", None, "a file") from error
    except (ValueError, RecursionError) as error:
        raise bad("is no JSON", str(error)[:80], "what sensitivity wrote") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise bad("no file of sensitivities", repr(record)[:80], f"format {FORMAT!r}")
    if record.get("version") != VERSION:
        raise bad("sensitivities of another version", repr(record.get("version"))[:40], VERSION)
    kinds = {"models": dict, "settings": dict, "done": list, "linears": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind) or len(record[key]) > _MAX_LINEARS:
            raise bad(f"{key} is not usable", repr(record.get(key))[:80], kind.__name__)
    texts = [*record["models"].values(), *record["done"]]
    if not all(isinstance(text, str) for text in texts):
        raise bad("hashes and probes are texts", "something else", "texts")
    return record


def _sums(path: Path, key: str, entry: object) -> Sums:
    usable = (
        isinstance(entry, list)
        and len(entry) == len(Sums().flat())
        and type(entry[0]) is int
        and all(type(value) in (int, float) and abs(value) < math.inf for value in entry)
        and entry[0] > 0
        and max(map(abs, entry[2::2])) < _MOST_LOG * entry[0]
        and min(entry[1::2]) >= 0
        and (entry[3] > 0 or entry[1] == 0)  # an error that nobody made would count for nothing
    )
    if not usable:
        raise CalibrationError(
            "sums are not usable", file=path, tensor=key[:120], found=repr(entry)[:80],
            needed="pictures, signal, a logarithm and an error of weight, int8 and int4: finite, "
            "none but logarithms negative, and an error of the weight",
        )  # fmt: skip
    return Sums.of(entry)
