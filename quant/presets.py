"""Recipes with everything that belongs to them, by one name: for those who want the best of a size.

What each gives is in docs/pocket-table.md, under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import QuantOptionError

AS_PICKED = "the level as picked"
_INT8 = "INT8 W8A8 rotated"


@dataclass(frozen=True)
class QuantPreset:
    """A level, and keyword arguments of ``QuantOptions``; each needs a calibration."""

    level: str
    options: Mapping[str, object]
    meaning: str


PRESETS: Mapping[str, QuantPreset] = {
    "INT8 auto": QuantPreset(
        _INT8,
        {"treatment": "auto"},
        "for each linear the nearest of plain, smoothed, rotated and both; needs this pack",
    ),
    "INT8 auto, stock ComfyUI": QuantPreset(
        _INT8,
        {"treatment": "auto-native"},
        "the nearest that ComfyUI's own loader reads too",
    ),
    "INT8 auto, 8% in bf16": QuantPreset(
        _INT8,
        {"treatment": "auto", "protect_share": 0.08},
        "INT8 auto with the most fragile 8 % of the linears left in bf16: a larger file",
    ),
    "W4A8, calibrated": QuantPreset("W4A8", {}, "4 bits that run on int8 units"),
    "Q4_K, calibrated": QuantPreset("Q4_K", {}, "4 bits in GGUF"),
}


def preset_of(name: str, calibrated: bool) -> QuantPreset:
    """The preset of that name; QuantOptionError for none, or without a calibration."""
    if name not in PRESETS:
        raise QuantOptionError(
            "no such preset", found=repr(name), needed="one of " + ", ".join(PRESETS)
        )
    if not calibrated:
        raise QuantOptionError(
            f"the preset {name} decides by a calibration, and there is none",
            needed="what Calibrate Ideogram 4 gives of this very model",
            hint="Connect Calibrate Ideogram 4 to the input calibration, or pick the preset "
            f"{AS_PICKED!r}.",
        )
    return PRESETS[name]
