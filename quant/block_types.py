"""Which GGUF type each linear gets: the user's rules, then the level."""

from __future__ import annotations

from collections.abc import Mapping

from ..ops.blocks import FORMATS
from .choose import Linear
from .encodings import Shape
from .errors import QuantOptionError
from .recipes import BLOCK_FALLBACKS, QuantOptions, Recipe, matches


def check_policy(policy: str) -> None:
    """QuantOptionError for a policy of older command lines and workflows, but for "uniform"."""
    if policy != "uniform":
        raise QuantOptionError(
            "there are no policies any more: their files were larger and worse than a calibrated "
            "level throughout",
            found=policy,
            needed="a calibration, or a target size in its place",
            hint="Leave the policy out; use --calibration with a plain level, or --target-gb "
            "(target_gb on the node).",
        )


def block_types(
    recipe: Recipe, options: QuantOptions, linears: Mapping[Linear, Shape]
) -> dict[Linear, str]:
    """The type of each of ``linears``, those that the recipe quantizes."""
    chosen: dict[Linear, str] = {}
    for (copy, module), shape in linears.items():
        ruled = next((r.qtype for r in options.types if matches(r.pattern, copy, module)), None)
        chosen[copy, module] = fitting(ruled or recipe.weight_type, shape)
    return chosen


def fitting(qtype: str, shape: Shape) -> str:
    """The type, or the first fallback whose blocks fill a row."""
    fits = [t for t in (qtype, *BLOCK_FALLBACKS) if shape[1] % FORMATS[t].block_size == 0]
    return fits[0]
