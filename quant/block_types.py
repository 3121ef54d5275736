"""Which GGUF type each linear gets: the user's rules, then a target size."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ..ops.blocks import FORMATS
from .choose import Linear
from .encodings import Shape
from .errors import QuantOptionError
from .recipes import BLOCK_FALLBACKS, QuantOptions, Recipe, matches

# Relative error of the weights, in dB, that a type costs where nothing was measured: gaussian rows.
# Q6_K and below as this pack encodes them without importance, K = 4608.
GAUSSIAN_DB = {"Q4_K": 22.9, "Q5_K": 29.1, "Q6_K": 35.2, "Q8_0": 45.4, "BF16": math.inf}

LADDER = tuple(GAUSSIAN_DB)
"""Types that a target size chooses from, smallest first."""

# How much an error of this linear counts where nothing was measured, first match wins. The inputs
# of w2 carry the outliers (arXiv 2606.14598 keeps them in bf16 first), adaLN scales every token of
# its block; the others are taken to be alike.
SENSITIVITY = (("*.feed_forward.w2", 4.0), ("*.adaln_modulation", 4.0), ("*", 1.0))


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


def header_reserve(tensors: int) -> int:
    """Bytes set aside for a file's header and padding: names, shapes, metadata."""
    return (1 << 15) + 256 * tensors


def check_type_options(recipe: Recipe, options: QuantOptions) -> None:
    """QuantOptionError for a target size that cannot be."""
    if options.target_bytes is None:
        return
    if recipe.file_format != "gguf":
        raise QuantOptionError(
            "a type for each linear is for GGUF levels",
            found=recipe.level,
            hint="For INT8 use protection (--protect-budget).",
        )
    if recipe.weight_type not in LADDER:
        raise QuantOptionError(
            "a target size is for the levels it can mix",
            found=recipe.level,
            needed="one of " + ", ".join(LADDER[:-1]),
        )


def block_types(
    recipe: Recipe, options: QuantOptions, linears: Mapping[Linear, Shape], other_bytes: int
) -> dict[Linear, str]:
    """The type of each of ``linears``, those that the recipe quantizes.

    ``other_bytes``: what the rest of the file takes. With a target size the level is the lowest
    type, and the sum of the output errors is the least found that fits. Raises QuantOptionError
    for a target that even the level does not meet.
    """
    check_type_options(recipe, options)
    chosen: dict[Linear, str] = {}
    free: dict[Linear, list[str]] = {}
    for (copy, module), shape in linears.items():
        ruled = next((r.qtype for r in options.types if matches(r.pattern, copy, module)), None)
        chosen[copy, module] = fitting(ruled or recipe.weight_type, shape)
        if ruled is None and options.target_bytes is not None:
            higher = LADDER[LADDER.index(recipe.weight_type) :]
            fits = [t for t in higher if shape[1] % FORMATS[t].block_size == 0]
            free[copy, module] = fits
            chosen[copy, module] = fits[0]
    if options.target_bytes is None:
        return chosen
    taken = other_bytes + sum(_nbytes(qtype, linears[key]) for key, qtype in chosen.items())
    if taken > options.target_bytes:
        raise QuantOptionError(
            f"the target size is below that of {recipe.level} throughout",
            found=f"{options.target_bytes:,} bytes",
            needed=f"at least {taken:,} bytes",
            hint="Choose a lower level, or a larger target.",
        )
    rungs = {
        key: [(_nbytes(t, linears[key]), loss(options, key, t), t) for t in types]
        for key, types in free.items()
    }
    return chosen | spend(rungs, options.target_bytes - taken)


def fitting(qtype: str, shape: Shape) -> str:
    """The type, or the first fallback whose blocks fill a row."""
    fits = [t for t in (qtype, *BLOCK_FALLBACKS) if shape[1] % FORMATS[t].block_size == 0]
    return fits[0]


def loss(options: QuantOptions, linear: Linear, qtype: str) -> float:
    """Squared relative output error of a type: as calibrated, else a gaussian's times a guess."""
    if qtype == "BF16":
        return 0.0
    stats = None if options.calibration is None else options.calibration.layer(*linear)
    if stats is not None and not math.isnan(stats.error(qtype)):
        return stats.error(qtype) ** 2
    factor = next(factor for pattern, factor in SENSITIVITY if fnmatchcase(linear[1], pattern))
    return factor * 10 ** (-GAUSSIAN_DB[qtype] / 10)


def spend(rungs: Mapping[Linear, list[tuple[int, float, str]]], budget: int) -> dict[Linear, str]:
    """For each linear one of its (bytes, loss, type), smallest first: least summed loss in budget.

    Everything starts at its first rung; ``budget`` is what the higher ones may cost more. Steps
    along the lower convex hull, largest gain a byte first, are the optimum but for the last few;
    what is left is spent on whatever single step still gains most.
    """
    at = dict.fromkeys(rungs, 0)
    steps = [(*_step(options, 0), key) for key, options in rungs.items()]
    queue = [(-gain / cost, str(key), key, to) for gain, cost, to, key in steps if gain > 0]
    heapq.heapify(queue)
    while queue:
        _, _, key, to = heapq.heappop(queue)
        cost = rungs[key][to][0] - rungs[key][at[key]][0]
        if cost > budget:
            continue
        budget -= cost
        at[key] = to
        gain, cost, further = _step(rungs[key], to)
        if gain > 0:
            heapq.heappush(queue, (-gain / cost, str(key), key, further))
    while True:
        best = max(
            (
                (options[at[key]][1] - options[to][1], str(key), key, to)
                for key, options in rungs.items()
                for to in range(at[key] + 1, len(options))
                if options[to][0] - options[at[key]][0] <= budget
            ),
            default=(0.0, "", None, 0),
        )
        if best[0] <= 0:
            return {key: rungs[key][place][2] for key, place in at.items()}
        _, _, key, to = best
        budget -= rungs[key][to][0] - rungs[key][at[key]][0]
        at[key] = to


def _step(options: list[tuple[int, float, str]], place: int) -> tuple[float, int, int]:
    """(gain, cost, rung) of the step up with the largest gain a byte; (0, 1, place) for none."""
    best = (0.0, 1, place)
    for to in range(place + 1, len(options)):
        gain, cost = options[place][1] - options[to][1], options[to][0] - options[place][0]
        if cost > 0 and gain / cost > best[0] / best[1]:
            best = (gain, cost, to)
    return best


def _nbytes(qtype: str, shape: Shape) -> int:
    return FORMATS[qtype].nbytes(shape)
