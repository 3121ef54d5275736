"""Changes of weights that no side path can be, through the host's own patching of weights.

The host computes a patched weight when it loads it, keeps the old one for taking the patch out,
encodes a quantized one anew in its own layout, and does the same for weights that it streams. One
patch a weight holds what all LoRAs of this pack do to it, so that each is computed of the model's
own weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_patcher
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..checkpoint.loras import WeightChange, changed
from ..errors import OpError
from .lora_loading import remaining_folding

KEY = "ideogram4_quant_lora_baked"
_PREFIX = "diffusion_model."
Changes = Mapping[str, Sequence[WeightChange]]


class Baked(WeightAdapterBase):
    """What LoRAs do to one weight, as a patch of the host's.

    weights: a tuple for each change, of nothing but tuples, tensors and constants: the host takes
    it apart to move the tensors to the device, and makes another of the parts.
    """

    name = "ideogram4_quant"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, changes: Sequence[tuple[WeightChange, float]]) -> Baked:
        """The patch of (change, strength)."""
        return cls(
            set(),
            tuple(
                (
                    strength,
                    change.kind,
                    tuple(change.tensors),
                    tuple(change.tensors.values()),
                    change.scale,
                    change.first,
                    change.rows,
                    change.magnitude,
                )
                for change, strength in changes
            ),
        )

    def calculate_weight(self, weight: Tensor, key: str, strength: float, *_, **__) -> Tensor:
        """The changed weight, in the dtype of ``weight``; the host's other arguments are for
        patches of some rows, which these never are."""
        changes = []
        for own, kind, names, tensors, *rest in self.weights:
            found = dict(zip(names, tensors, strict=True))
            changes.append((WeightChange(kind, found, *rest), own * strength))
        return changed(weight, changes)


def bake(
    patcher: comfy.model_patcher.ModelPatcher, changes: Changes, strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with these changes on top of those that it already has.

    OpError for a model in another basis (a folded file behind the stock loader), or one that has
    no such weight.
    """
    if not changes or strength == 0.0:
        return patcher
    if remaining_folding(patcher) is not None:
        raise OpError(
            "this LoRA changes weights, and those of a folded file are in another basis",
            found="a folded file that the stock loader has loaded",
            hint="Load the model with Load Ideogram 4 (quantized), which undoes the folding.",
        )
    patcher = patcher.clone()
    loaded = (*(patcher.get_attachment(KEY) or ()), (changes, strength))
    patcher.set_attachments(KEY, loaded)
    patches = {}
    for name in changes:
        key = _PREFIX + name
        others = [p for p in patcher.patches.get(key, ()) if not isinstance(p[1], Baked)]
        patcher.patches[key] = others
        patches[key] = Baked.of(
            [(change, s) for found, s in loaded for change in found.get(name, ())]
        )
    missing = set(patches) - set(patcher.add_patches(patches))
    if missing:
        raise OpError(
            "a LoRA was made for another model: this one lacks a weight that it changes",
            found=f"no {min(missing)}",
            hint="Connect the node to the model that the LoRA was trained for.",
        )
    return patcher
