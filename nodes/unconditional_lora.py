"""The unconditional copy as the conditional one with a LoRA: 9.3 GB of weights less in memory."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.loras import LoraFile, describe, parse_lora, read_lora, read_strength
from ..errors import CheckpointError
from .lora_loading import add_lora, linear_shapes, other_shapes
from .model_files import host_listing
from .model_source import source_of
from .one_copy import stand_in

FOLDERS = "loras"


def unconditional_of(conditional: ModelPatcher, name: str) -> tuple[ModelPatcher, str]:
    """(what runs the unconditional pass on the weights of a conditional copy, a line about it).

    name: of a file in models/loras that was trained so. CheckpointError and its kinds for one that
    is for the other copy, or does not fit.
    """
    path = host_listing(FOLDERS).path(name)
    found = parse_lora(
        read_lora(path),
        linear_shapes(conditional),
        name,
        read_strength(path),
        other_shapes(conditional),
    )
    if found.changes_for_copy(UNCONDITIONAL, UNCONDITIONAL):
        raise CheckpointError(
            "this unconditional LoRA changes weights in a way that no side path can, and weights "
            "that both passes share cannot be changed for one",
            file=name,
            needed="a plain LoRA: pairs of lora_A and lora_B",
        )
    updates = found.for_copy(UNCONDITIONAL, UNCONDITIONAL)
    if not updates:
        raise CheckpointError(
            "picked as the unconditional LoRA, but it says that it is for the conditional copy",
            file=name,
            hint="Load it with Load LoRA for Ideogram 4.",
        )
    rank = max(update.rank for update in updates.values())
    nbytes = 2 * sum(update.down.numel() + update.up.numel() for update in updates.values())
    line = (
        f"the conditional copy with {name} ({len(updates)} linears, rank {rank}, "
        f"{nbytes / 1e6:.0f} MB in 16 bits): one resident copy runs both passes"
    )
    patcher = add_lora(conditional, updates, 1.0)
    return stand_in(patcher, f"the conditional copy with {name}"), (
        f"{line}; {describe(found)}" if found.unknown else line
    )


def marked(
    model: ModelPatcher,
    conditional: ModelPatcher,
    found: LoraFile,
    apply_to: str,
    how: str,
) -> ModelPatcher:
    """A conditional copy with a LoRA of the unconditional pass alone, as what stands for the other.

    Any other model as it is.
    """
    source = source_of(model)
    of_conditional = source is not None and source.copy == CONDITIONAL
    if found.for_copy(CONDITIONAL, apply_to) or not found.for_copy(UNCONDITIONAL, apply_to):
        return model
    shared = model.is_clone(conditional) or of_conditional
    return stand_in(model, f"the conditional copy with {how}") if shared else model
