"""How much of an error in a linear's output arrives in the picture: the gain of every linear.

The gain of a linear is the relative error energy of the final latents for a relative error energy
of one in its outputs, to first order; errors of different linears add as if independent
(docs/error-sources.md). ``engine.sensitivity`` measures gains; without a measurement those of the
pocket model stand in, by kind of linear and copy.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..checkpoint.copy_names import CONDITIONAL
from ..files.new_file import check_output, replaced
from ..sampling.presets import MAIN_GUIDANCE
from .choose import Linear
from .errors import CalibrationError

FORMAT = "ideogram4-quant sensitivity"
VERSION = 1
_MAX_BYTES = 32 << 20
_MAX_LINEARS = 10_000
_MOST_LOG = 600.0  # a double's exponent

DEFAULT_LAYERS = 4
"""Transformer blocks of the model that :data:`DEFAULT_GAINS` were measured on."""

# The conditional copy's, of the pocket model, each linear quantized alone to calibrated W4A8: the
# relative error energy of the final latents over that of its outputs, geometric means over blocks
# (16 held-out captions, default preset). First match wins; linears outside the blocks count as w1.
DEFAULT_GAINS: tuple[tuple[str, float], ...] = (
    ("*.feed_forward.w2", 2.5),
    ("*.feed_forward.w3", 0.025),
    ("*.attention.o", 0.2),
    ("*.attention.qkv", 0.0045),
    ("*.adaln_modulation", 0.04),
    ("*", 0.12),
)
"""Gains by kind of linear in the conditional copy, for a model that was not measured."""

UNCONDITIONAL_SHARE = ((MAIN_GUIDANCE - 1) / MAIN_GUIDANCE) ** 2
"""What of a conditional gain the same linear of the other copy has: guidance adds the errors of
both as ``g`` and ``g - 1``, and both copies are hurt alike (docs/pairs.md). The pocket model's own
share is 0.03 to 0.12: the scale that its copies are exported with, which no other model has."""


@dataclass(frozen=True)
class Sums:
    """What was summed of one linear: the natural logarithm of the energy that ``arrived`` in a
    picture's final latents, relative to theirs; ``error`` and ``signal`` energy of its outputs."""

    pictures: int = 0
    log_arrived: float = 0.0
    error: float = 0.0
    signal: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def gain(self) -> float:
        """Relative error energy that arrives, for one of 1 in the outputs; 0 for no error.

        Of the typical picture: a mean of logarithms, as a mean of decibels is. A few pictures are
        near to becoming others, and would be most of a mean of energies.
        """
        if not self.error:
            return 0.0
        return math.exp(self.log_arrived / self.pictures) * self.signal / self.error


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

    def gain(self, copy: str, module: str) -> float | None:
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
            "linears": {key: list(vars(sums).values()) for key, sums in self.linears.items()},
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


def default_gain(copy: str, module: str, layers: int) -> float:
    """The pocket model's gain for this kind of linear, the unconditional copy's by its part in
    guidance; a block's share falls with their number."""
    found = next(gain for pattern, gain in DEFAULT_GAINS if fnmatchcase(module, pattern))
    share = 1.0 if copy == CONDITIONAL else UNCONDITIONAL_SHARE
    return found * share * DEFAULT_LAYERS / max(layers, 1)


def gains_of(
    sensitivity: Sensitivity | None, linears: list[Linear], digests: Mapping[str, str]
) -> dict[Linear, float]:
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
        and len(entry) == len(vars(Sums()))
        and type(entry[0]) is int
        and all(type(value) in (int, float) and abs(value) < math.inf for value in entry)
        and entry[0] > 0
        and abs(entry[1]) < _MOST_LOG * entry[0]
        and min(entry[2:]) >= 0
    )
    if not usable:
        raise CalibrationError(
            "sums are not usable", file=path, tensor=key[:120], found=repr(entry)[:80],
            needed="pictures, log_arrived, error, signal: finite, none negative but the second",
        )  # fmt: skip
    return Sums(*entry)
