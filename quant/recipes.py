"""The recipes as data: what each level writes, into which container, and what may be changed.

A recipe names the type of the quantized linears. Which linears those are, which stay in bf16 and
which get another type is decided by patterns over module names, first match wins; nothing else in
the quantizer knows a layer by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .errors import QuantOptionError
from .level_names import nearest, resolve

if TYPE_CHECKING:  # this module is the command line's, too, before torch is there
    from torch import Tensor

    from .calibration import Calibration

_log = logging.getLogger(__name__)

BLOCK_LINEARS = "layers.*"
"""Module names of the linears inside the transformer blocks (204 of the model's 211)."""


@dataclass(frozen=True)
class TypeRule:
    """Linears whose module name matches ``pattern`` (shell wildcards) are stored as ``qtype``."""

    pattern: str
    qtype: str


@dataclass(frozen=True)
class Recipe:
    """One level: ``weight_type`` is one of ``NATIVE_TYPES`` or the name of a GGUF type.

    ``bits`` is the class of precision: a source of a lower class is refused. ``file_type`` is
    llama.cpp's number for ``general.file_type``. ``finer``: linears that get another type, first
    match wins.
    """

    level: str
    file_format: str  # "safetensors" or "gguf"
    weight_type: str
    bits: int
    rotation: int | None = None
    file_type: int | None = None
    finer: tuple[TypeRule, ...] = ()

    def type_of(self, module: str) -> str:
        """The type of a linear, by its canonical module name."""
        found = (rule.qtype for rule in self.finer if fnmatchcase(module, rule.pattern))
        return next(found, self.weight_type)


NATIVE_TYPES = ("INT8", "W6A8", "W4A8", "W4A4")
"""Types of a linear that ComfyUI's own containers have."""

INT4_FINER = (TypeRule("layers.*.feed_forward.w2", "W4A8"),)
"""What does not stand activations of 4 bits: w2, whose errors make 63 % of the picture's
(docs/error-sources.md). On the pocket model as trained, with loud channels, with loud tokens (16
captions, latent SQNR in dB): none finer 23.0, 14.3, 22.2; w2 25.3, 25.2, 25.0, for 0.1 bit a
weight."""


RECIPES: dict[str, Recipe] = {
    recipe.level: recipe
    for recipe in (
        Recipe("INT8 W8A8", "safetensors", "INT8", 8),
        Recipe("INT8 W8A8 rotated", "safetensors", "INT8", 8, rotation=256),
        Recipe("W6A8", "safetensors", "W6A8", 6, rotation=256),
        Recipe("W4A8", "safetensors", "W4A8", 4, rotation=256),
        Recipe("INT4 W4A4", "safetensors", "W4A4", 4, rotation=256, finer=INT4_FINER),
        Recipe("Q8_0", "gguf", "Q8_0", 8, file_type=7),
        Recipe("Q6_K", "gguf", "Q6_K", 6, file_type=18),
        Recipe("Q5_K", "gguf", "Q5_K", 5, file_type=16),
        Recipe("Q5_1", "gguf", "Q5_1", 5, file_type=9),
        Recipe("Q5_0", "gguf", "Q5_0", 5, file_type=8),
        Recipe("Q4_K", "gguf", "Q4_K", 4, file_type=14),
        Recipe("IQ4_NL", "gguf", "IQ4_NL", 4, file_type=25),
        Recipe("IQ4_XS", "gguf", "IQ4_XS", 4, file_type=30),
        Recipe("Q4_1", "gguf", "Q4_1", 4, file_type=3),
        Recipe("Q4_0", "gguf", "Q4_0", 4, file_type=2),
        Recipe("Q3_K", "gguf", "Q3_K", 3, file_type=11),
        Recipe("Q2_K", "gguf", "Q2_K", 2, file_type=10),
    )
}

MIXED: dict[str, Recipe] = {
    "mixed": Recipe("mixed", "safetensors", "mixed", 8, rotation=256),
    "mixed GGUF": Recipe("mixed GGUF", "gguf", "mixed", 8),
}
"""What a size is given for instead of a level: ``QuantOptions.storage`` says how each linear is
stored."""

SOURCE_BITS: dict[str, int] = {
    "BF16": 16,
    "FP8": 8,
    "NF4": 4,
    "MXFP4": 4,
    "MXFP8": 8,
    "INT8 blockwise": 8,
    "NVFP4": 4,
    "AWQ W4A16": 4,
    "SVDQuant W4A4": 4,
    "SDNQ 8-bit": 8,
    "SDNQ 4-bit": 4,
    **{level: recipe.bits for level, recipe in RECIPES.items()},
}
"""Class of precision of every level that can be read."""

CONTAINERS = ("native", "transformer-lab")
"""How INT8 is stored in safetensors: as ComfyUI does, or Transformer Lab (``.wq/.ws/.smooth``)."""

TREATMENTS = ("smooth", "auto", "auto-native")
"""What a calibration may decide: smoothing on top of the level, the best of all that was measured,
or the best of what ComfyUI's own container can say."""

ROUNDINGS = ("feedback", "nearest")
"""How codes are chosen with a calibration: so that errors of correlated inputs cancel, or each on
its own."""

READ_ONLY = ("MXFP4",)
"""GGUF types that are not written: there is a nearer one of their size."""

PACKED_BITS = {"W6A8": 6, "W4A8": 4}
"""Width of the codes of the levels in ComfyUI's container ``asym_w4a8_int8``."""

PACKED_GROUP = 16
"""Columns that share a scale there."""

# What a GGUF type falls back to where a row is no whole number of its blocks.
BLOCK_FALLBACKS = ("Q8_0", "BF16")


@dataclass(frozen=True)
class QuantOptions:
    """What a recipe leaves open.

    - ``container``: one of :data:`CONTAINERS`, for the INT8 levels.
    - ``protect``: module names or patterns (``layers.*.feed_forward.w2``) that stay in bf16. A
      prefix ``conditional.`` or ``unconditional.`` restricts one to a copy; in all of these.
    - ``smooth``: module name -> SmoothQuant vector [in_features]: the weight's columns are
      multiplied by it, the activations divided. For INT8; in the native container stock ComfyUI
      refuses the file.
    - ``types``: GGUF types of single linears, first match wins.
    - ``storage``: ``conditional.layers.0.attention.qkv`` -> one of ``storage.STORAGES``, for every
      linear that is quantized; ``quant.target`` chooses it for a size. For mixed levels alone.
      ``prediction`` is what was foretold of it, for the file's metadata.
    - ``native``: mix only what ComfyUI's own loader reads.
    - ``linears``: ``"blocks"``, ``"all"``, or None for the container's habit: all in Transformer
      Lab's, else those in the blocks.
    - ``licence``: recorded where the source names none.
    - ``calibration``: statistics of the linears' inputs, of this very model: scales of GGUF types
      are then searched for the least output error, and codes of every type rounded for it. The
      following need it.
    - ``rounding``: one of :data:`ROUNDINGS`.
    - ``treatment``: one of :data:`TREATMENTS`; None: the level's own.
    - ``alpha``: strength of smoothing, 0 (weights alone) to 1 (activations alone); None: the best
      of those that were measured for each input.
    - ``protect_share``, ``protect_bytes``, ``protect_below``: keep the most fragile linears in
      bf16: that share of those quantized, as many as cost that many bytes more, all whose output
      would be below that many dB of SQNR.
    """

    container: str = "native"
    protect: tuple[str, ...] = ()
    smooth: Mapping[str, Tensor] | None = None
    types: tuple[TypeRule, ...] = ()
    storage: Mapping[str, str] | None = None
    prediction: Mapping[str, object] | None = None
    native: bool = False
    linears: str | None = None
    licence: str | None = None
    calibration: Calibration | None = None
    rounding: str = ROUNDINGS[0]
    treatment: str | None = None
    alpha: float | None = None
    protect_share: float | None = None
    protect_bytes: int | None = None
    protect_below: float | None = None


def recipe_of(level: str) -> Recipe:
    """The recipe of a level; case, blanks, dashes and underscores do not matter.

    Names of other tools are taken where they leave no doubt; where one may mean several levels, the
    nearer one is taken and the log says so. Raises QuantOptionError with the list of levels.
    """
    name, note = resolve(level, RECIPES | MIXED)
    if note is not None:
        _log.warning("%s", note)
    if name is not None:
        return (RECIPES | MIXED)[name]
    if level.upper() in SOURCE_BITS:
        raise QuantOptionError(
            "this level is read, and not written",
            found=level,
            needed="one of " + ", ".join(RECIPES),
        )
    near = nearest(level, RECIPES)
    raise QuantOptionError(
        "unknown level",
        found=repr(level),
        needed="one of " + ", ".join(RECIPES),
        hint=None if near is None else f"Did you mean {near}?",
    )


def matches(pattern: str, copy: str, module: str) -> bool:
    """Whether a pattern means this module of this copy."""
    return fnmatchcase(module, pattern) or fnmatchcase(f"{copy}.{module}", pattern)
