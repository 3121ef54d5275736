"""Guidance from one resident copy: both passes run the same weights, and side paths take turns.

Two patchers of one model stand for the two copies. Only one of them can be injected, so the host's
own guiders run both passes with the changes of whichever was loaded last. Here a pass runs with
those of its own patcher: the other's are taken out before it and put back after it, whether they
are LoRAs of this pack, fused blocks or what another node injects. Weights are patched once for
both, so patches of weights or objects that differ cannot be given to one pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import comfy.patcher_extension as extension
from comfy.model_patcher import ModelPatcher

from ..errors import OpError, PairMismatchError

INPUT, CONDITIONAL_COPY = "unconditional input", "conditional copy"
CHOICES = (INPUT, CONDITIONAL_COPY)
_STANDS_IN = "ideogram4_quant_stands_in"
_HINT = (
    f"For guidance from one copy set unconditional_from to {CONDITIONAL_COPY!r}, or pick an "
    "unconditional LoRA in the loader; else connect the unconditional copy."
)


def stand_in(patcher: ModelPatcher, how: str) -> ModelPatcher:
    """A clone of a conditional copy that may be connected as the unconditional one.

    how: what it is, for reports. Sampling it by itself, as the host's guiders do, is an OpError:
    they would run it with the changes of the conditional copy.
    """
    clone = patcher.clone()
    if stands_in(patcher) is None:
        extension.add_wrapper_with_key(
            extension.WrappersMP.PREPARE_SAMPLING,
            _STANDS_IN,
            _refuse_elsewhere,
            clone.model_options,
            is_model_options=True,
        )
    clone.set_attachments(_STANDS_IN, how)
    return clone


def stands_in(patcher: ModelPatcher) -> str | None:
    """What a conditional copy is that stands for the unconditional one; None for any other."""
    return patcher.get_attachment(_STANDS_IN)


def chosen(
    conditional: ModelPatcher, unconditional: ModelPatcher | None, source: str
) -> ModelPatcher | None:
    """The patcher of the unconditional pass. source: one of CHOICES.

    With the conditional copy and nothing connected, that copy as it is, LoRAs included, on image
    tokens alone. PairMismatchError for two models where one was asked for, or for one model on both
    inputs that nobody asked for.
    """
    if source == INPUT:
        if unconditional is not None and unconditional.is_clone(conditional):
            _refuse_by_accident(unconditional)
        return unconditional
    if unconditional is None:
        return stand_in(conditional, "the conditional copy on image tokens alone")
    if not unconditional.is_clone(conditional) and stands_in(unconditional) is None:
        raise PairMismatchError(
            f"unconditional_from says {CONDITIONAL_COPY!r}, but another model is connected",
            needed="nothing on the unconditional input, or the conditional model with a LoRA",
            hint=f"Disconnect it, or set unconditional_from to {INPUT!r}.",
        )
    said = stands_in(unconditional) or "the conditional copy as connected, on image tokens alone"
    return stand_in(unconditional, said)


def check_shared(conditional: ModelPatcher, unconditional: ModelPatcher) -> None:
    """PairMismatchError where the two change the weights or objects of their one model apart."""
    kinds = {
        "weights": _same_weights(conditional, unconditional),
        "objects": _same(conditional.object_patches, unconditional.object_patches),
        "weight functions": _same(
            conditional.weight_wrapper_patches, unconditional.weight_wrapper_patches
        ),
    }
    differing = [kind for kind, same in kinds.items() if not same]
    if differing:
        raise PairMismatchError(
            "the two inputs are one model in memory with different patches of its "
            f"{' and '.join(differing)}, which would act on both passes or on none",
            needed="the same patches on both, LoRAs beside the weights on either",
            hint="Use Load LoRA for Ideogram 4 or a bypass LoRA, which act beside the weights; or "
            "patch the model before it is connected twice; or load the unconditional copy.",
        )


@contextmanager
def turn(resident: ModelPatcher, other: ModelPatcher) -> Iterator[None]:
    """Within, the model of both is changed as ``other`` says, and not as ``resident`` does.

    resident: the one that the host has loaded and injected, and has again afterwards.
    """
    model = resident.model
    before = model.current_patcher
    if resident.current_hooks is not None:  # weights that the host has patched for a conditioning
        resident.apply_hooks(None)
    resident.eject_model()
    try:
        other.inject_model()
        model.current_patcher = other
        yield
    finally:
        other.eject_model()
        model.current_patcher = before
        resident.inject_model()


def beside(resident: ModelPatcher, other: ModelPatcher) -> list[ModelPatcher]:
    """The small models that ``other`` needs on its device and ``resident`` does not bring."""
    there = {id(small.model) for small in resident.get_additional_models()}
    return [
        small
        for small in other.get_additional_models()
        if small.load_device == other.load_device and id(small.model) not in there
    ]


def _refuse_elsewhere(*_args: object, **_kwargs: object) -> NoReturn:
    raise OpError(
        "this model stands for the unconditional copy on weights that the conditional one has in "
        "memory, and this sampler or guider would run both passes alike",
        needed="Ideogram 4 Sampler, or Dual-copy CFG (Ideogram 4)",
        hint="Connect it to the unconditional input of one of these.",
    )


def _refuse_by_accident(unconditional: ModelPatcher) -> None:
    if stands_in(unconditional) is None:
        raise PairMismatchError(
            "one model is connected as both copies, so there is no unconditional copy",
            needed="two copies, or the word that one is to run both passes",
            hint=_HINT,
        )


def _same_weights(first: ModelPatcher, second: ModelPatcher) -> bool:
    if not first.patches and not second.patches:
        return True
    if first.patches_uuid == second.patches_uuid:
        return True
    return first.patches.keys() == second.patches.keys() and all(
        len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
        for one, other in ((first.patches[k], second.patches[k]) for k in first.patches)
    )


def _same(first: dict, second: dict) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        a is b or (isinstance(a, list) and isinstance(b, list) and a == b)
        for a, b in ((first[key], second[key]) for key in first)
    )
