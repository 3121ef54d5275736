"""Which INT8 treatment each linear gets, and which stay in bf16: decided by a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .encodings import Shape
from .errors import QuantOptionError
from .layer_stats import LayerStats
from .recipes import RECIPES, ROUNDINGS, TREATMENTS, QuantOptions, Recipe
from .tables import human_bytes
from .treatments import (
    ROTATED_INPUTS,
    Treatment,
    group_loss,
    input_group,
    rotation_group,
    smoothing,
)

SMOOTHING_GAIN_DB = 4.0
"""What a smoothing vector must gain over the best treatment without one to be chosen.

Errors are measured without error feedback, which makes up for the smaller gains: on the pocket
model vectors chosen for 0.5 dB end up to 0.8 dB behind rotation alone where rotation is right,
those for 4 dB as near; and sick models still gain 6 to 35 dB (docs/pocket-table.md)."""

DENSE_BELOW_DB = 40.0
"""Output SQNR that rounded activations alone must leave a linear, or it is multiplied in 16 bits.

Error feedback mends weights, nothing mends activations. Rows of 12288 Gaussian inputs reach 4 times
their rms on average: in 127 steps to either side that is sqrt(12) * 127 / 4, 41 dB. On the pocket
model with loud channels three or four w2 of 48 linears have less (docs/making-files.md)."""

Linear = tuple[str, str]
"""Copy and canonical module name."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One linear: ``treatment`` None means bf16; ``smooth`` fp32 [K] goes with its alpha.

    ``sqnr_db`` is the output's under the treatment, as calibrated (NaN: not measured); ``reason``
    says why, for the file's metadata; ``dense``: multiplied in 16 bits, though stored as INT8.
    """

    treatment: Treatment | None
    reason: str
    sqnr_db: float = math.nan
    smooth: Tensor | None = None
    dense: bool = False


def check_choice_options(recipe: Recipe, options: QuantOptions) -> None:
    """QuantOptionError for options about treatments and protection that contradict each other."""
    asked = {
        "treatment": options.treatment is not None,
        "alpha": options.alpha is not None,
        "protect_share": options.protect_share is not None,
        "protect_bytes": options.protect_bytes is not None,
        "protect_below": options.protect_below is not None,
    }
    for name, low, high in (("alpha", 0, 1), ("protect_share", 0, 1), ("protect_bytes", 0, None)):
        value = getattr(options, name)
        if value is not None and not low <= value <= (math.inf if high is None else high):
            raise QuantOptionError(f"{name} out of range", found=value, needed=f"{low} to {high}")
    if options.rounding not in ROUNDINGS:
        raise QuantOptionError(
            "unknown rounding", found=options.rounding, needed=f"one of {', '.join(ROUNDINGS)}"
        )
    used = [name for name, given in asked.items() if given]
    if not used:
        return
    if recipe.weight_type != "INT8":
        raise QuantOptionError(f"{used[0]} is for INT8 levels", found=recipe.level)
    if options.calibration is None:
        raise QuantOptionError(
            f"{used[0]} needs a calibration",
            hint="Make one with ideogram4-quant calibrate, and give it (--calibration CAL).",
        )
    if options.treatment not in (None, *TREATMENTS):
        raise QuantOptionError(
            "unknown treatment", found=options.treatment, needed=f"one of {', '.join(TREATMENTS)}"
        )
    if options.treatment in ("auto", "auto-native") and options.alpha is not None:
        raise QuantOptionError(
            "alpha goes with the treatment smooth", found=f"treatment {options.treatment}"
        )
    if options.smooth is not None and options.treatment is not None:
        raise QuantOptionError("smoothing vectors are given already", found=options.treatment)


def choose(
    recipe: Recipe, container: str, options: QuantOptions, linears: Mapping[Linear, Shape]
) -> dict[Linear, Choice]:
    """A choice for each of ``linears``, those that the recipe quantizes.

    Linears that read the same input get the same treatment and one smoothing vector. Empty where no
    option asks for a calibration's word. Raises QuantOptionError where a budget needs an error that
    was not measured.
    """
    check_choice_options(recipe, options)
    if options.calibration is None or recipe.weight_type != "INT8":
        return {}
    groups: dict[Linear, list[Linear]] = {}
    for copy, module in linears:
        groups.setdefault((copy, input_group(module)), []).append((copy, module))
    chosen: dict[Linear, Choice] = {}
    for members in groups.values():
        found = [options.calibration.layer(*member) for member in members]
        shapes = [linears[member] for member in members]
        choices = _treat(recipe, container, options, found, shapes[0][1])
        chosen.update(zip(members, choices, strict=True))
    chosen = {linear: chosen[linear] for linear in linears}
    return _protect(chosen, options, linears)


def int8_choices(
    container: str, options: QuantOptions, linears: Mapping[Linear, Shape]
) -> dict[Linear, Choice]:
    """What a calibration chooses for INT8 where a file mixes it with others; empty without one."""
    if options.calibration is None or container == "gguf":
        return {}
    measured = any(name.startswith("int8") for name in options.calibration.candidates)
    treatment = options.treatment or ("auto-native" if options.native else "auto")
    chosen = replace(options, treatment=treatment if measured else None)
    return choose(RECIPES["INT8 W8A8 rotated"], container, chosen, linears)


def choice_notes(container: str, choices: Mapping[Linear, Choice]) -> list[str]:
    """What is protected, and what smoothing means for other programs, a line each."""
    notes = []
    kept = [module for (_, module), c in choices.items() if c.treatment is None]
    if kept:
        notes.append(f"kept in bf16, by their error: {', '.join(kept)}")
    dense = [module for (_, module), c in choices.items() if c.dense]
    if dense:
        notes.append(
            f"{len(dense)} linears are multiplied in 16 bits by this pack, for what rounding their "
            "activations would cost; stock ComfyUI 0.33 loads the file and multiplies them as "
            f"int8: {', '.join(dense)}"
        )
    smooth = sum(choice.smooth is not None for choice in choices.values())
    if smooth and container == "native":
        notes.append(
            f"{smooth} linears carry a smoothing vector: stock ComfyUI refuses this file, this "
            "pack loads it; the treatment auto-native writes one that both load"
        )
    return notes


# ---- treatments


def _treat(
    recipe: Recipe,
    container: str,
    options: QuantOptions,
    found: Sequence[LayerStats | None],
    in_features: int,
) -> list[Choice]:
    """The choice for each linear of one input group."""
    rotatable = container != "transformer-lab" and rotation_group(in_features) is not None
    usual = Treatment(rotated=recipe.rotation is not None and rotatable)
    stats = [each for each in found if each is not None]
    if len(stats) < len(found):
        return [Choice(usual, f"{usual.name}: not calibrated") for _ in found]
    allowed = [t for t in _allowed(options, usual, stats) if rotatable or not t.rotated]
    best = min(allowed, key=lambda treatment: group_loss(stats, treatment), default=usual)
    if options.treatment == "auto" and not best.native:
        native = min(
            (t for t in allowed if t.native), key=lambda t: group_loss(stats, t), default=best
        )
        gain = 10 * math.log10(
            max(group_loss(stats, native), 1e-30) / max(group_loss(stats, best), 1e-30)
        )
        best = best if gain >= SMOOTHING_GAIN_DB else native
    smooth = None if best.alpha is None else smoothing(stats, best.alpha)
    rounded = min(each.sqnr_db(ROTATED_INPUTS) for each in stats)  # NaN where not measured
    asked = options.treatment == "auto-native" and not options.native  # a mix has finer storages
    dense = asked and best.rotated and rounded < DENSE_BELOW_DB
    why = f"; in 16 bits, as rounded activations alone leave {rounded:.1f} dB" if dense else ""
    return [
        Choice(best, _reason(each, best, allowed) + why, each.sqnr_db(best.name), smooth, dense)
        for each in stats
    ]


def _allowed(
    options: QuantOptions, usual: Treatment, stats: Sequence[LayerStats]
) -> list[Treatment]:
    """The treatments to choose from, all measured but for an alpha that was given."""
    if options.treatment is None and options.alpha is None:
        return [usual]
    if options.alpha is not None:
        return [replace(usual, alpha=options.alpha)]
    measured = [
        treatment
        for name in stats[0].noise
        if all(name in each.noise for each in stats)
        and (treatment := Treatment.parse(name)) is not None
    ]
    if options.treatment == "smooth":
        return [t for t in measured if t.rotated == usual.rotated and not t.native]
    if options.treatment == "auto-native":
        return [t for t in measured if t.native]
    return measured


def _reason(stats: LayerStats, best: Treatment, allowed: Sequence[Treatment]) -> str:
    db = stats.sqnr_db(best.name)
    if math.isnan(db):
        return f"{best.name}: asked for, not measured"
    others = [t for t in allowed if t != best and not math.isnan(stats.error(t.name))]
    if not others:
        return f"{best.name}: {db:.1f} dB"
    second = min(others, key=lambda treatment: stats.error(treatment.name))
    figure = f"{second.name} {stats.sqnr_db(second.name):.1f} dB"
    if stats.error(second.name) >= stats.error(best.name):
        return f"{best.name}: {db:.1f} dB, the best of {len(others) + 1}; {figure}"
    why = "the best for all linears of this input"
    if best.native and not second.native:
        why = f"smoothing gains the linears of this input less than {SMOOTHING_GAIN_DB:g} dB"
    return f"{best.name}: {db:.1f} dB, {why}; {figure}"


# ---- protection


def _protect(
    chosen: dict[Linear, Choice], options: QuantOptions, linears: Mapping[Linear, Shape]
) -> dict[Linear, Choice]:
    """The same with the linears in bf16 that the options protect by error."""
    budgets = (options.protect_share, options.protect_bytes, options.protect_below)
    if all(budget is None for budget in budgets):
        return chosen
    unknown = [linear for linear, choice in chosen.items() if math.isnan(choice.sqnr_db)]
    if len(unknown) == len(chosen):
        raise QuantOptionError(
            "protection by error needs errors, and none was measured for this treatment",
            file=options.calibration.path,
            found=chosen[unknown[0]].treatment.name,
            needed="one of " + ", ".join(options.calibration.candidates),
        )
    measured = [linear for linear in chosen if linear not in set(unknown)]
    ranked = sorted(measured, key=lambda linear: chosen[linear].sqnr_db)
    kept: dict[Linear, str] = {}
    if options.protect_below is not None:
        for linear in ranked:
            if chosen[linear].sqnr_db < options.protect_below:
                kept[linear] = f"below {options.protect_below:g} dB"
    if options.protect_share is not None:
        count = round(options.protect_share * len(chosen))
        for linear in ranked[:count]:
            kept.setdefault(linear, f"among the {count} most fragile of {len(chosen)}")
    if options.protect_bytes is not None:
        left = options.protect_bytes
        for linear in ranked:
            cost = math.prod(linears[linear])  # bf16 takes one byte more a weight
            if cost <= left and linear not in kept:
                kept[linear] = f"within the budget of {human_bytes(options.protect_bytes)}"
                left -= cost
    return {
        linear: replace(
            choice,
            treatment=None,
            smooth=None,
            dense=False,
            reason=f"bf16: {kept[linear]} ({choice.reason})",
        )
        if linear in kept
        else choice
        for linear, choice in chosen.items()
    }
