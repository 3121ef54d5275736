"""Whether models and a conditioning belong together, asked before anything is sampled."""

from __future__ import annotations

import comfy.model_base
import comfy.model_patcher

from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..errors import NotIdeogram4Error, OpError, PairMismatchError
from ..sampling import trained_sides
from .encoder_loading import MAX_TOKENS
from .model_source import source_of
from .one_copy import stands_in


def check_pair(
    conditional: comfy.model_patcher.ModelPatcher,
    unconditional: comfy.model_patcher.ModelPatcher | None,
) -> None:
    """The two are Ideogram 4, of one size, and neither takes the other's place."""
    for patcher, role in ((conditional, "conditional"), (unconditional, "unconditional")):
        if patcher is None:
            continue
        if not isinstance(patcher.model, comfy.model_base.Ideogram4):
            raise NotIdeogram4Error(
                f"the {role} model is not Ideogram 4",
                found=type(patcher.model).__name__,
                hint="Connect a model from a loader of Ideogram 4.",
            )
        source = source_of(patcher)
        as_if = role == UNCONDITIONAL and stands_in(patcher) is not None
        if source is not None and source.copy != role and not as_if:
            raise PairMismatchError(
                f"the model on the {role} input is the {source.copy} copy",
                file=source.path,
                hint="Swap the two connections, or pick the other file in the loader.",
            )
        if role == CONDITIONAL and stands_in(patcher) is not None:
            raise PairMismatchError(
                "the model on the conditional input stands for the unconditional copy",
                found=stands_in(patcher),
                hint="Swap the two connections.",
            )
    if unconditional is None:
        return
    left, right = _dimensions(conditional), _dimensions(unconditional)
    # the unconditional copy may be without its text part, and then does not tell how wide it is
    name = next((k for k in left if left[k] != right[k] and k != "llm_features_dim"), None)
    if name is not None:
        raise PairMismatchError(
            f"the two copies are of different sizes: {name} differs",
            found=f"{left[name]} and {right[name]}",
            needed="the same in both",
            hint="Pick two files of one model.",
        )


def check_conditioning(model: comfy.model_patcher.ModelPatcher, positive: list) -> None:
    """The text features are as wide as this model reads, and no longer than it was trained on."""
    width = _dimensions(model)["llm_features_dim"]
    for features, _ in positive:
        if features is None:
            continue
        if features.shape[-1] != width:
            raise OpError(
                "this conditioning comes from another text encoder",
                found=f"{features.shape[-1]} features a token",
                needed=width,
                hint="Encode the caption with the Qwen3-VL encoder that belongs to Ideogram 4.",
            )
        if features.shape[1] > MAX_TOKENS:
            raise OpError(
                "the caption is too long",
                found=f"{features.shape[1]} tokens",
                needed=f"at most {MAX_TOKENS}",
                hint="Shorten the descriptions, or describe fewer elements.",
            )


def sides_of(model: comfy.model_patcher.ModelPatcher) -> tuple[int, int]:
    """(smallest, largest) side in px that the model was trained on."""
    return trained_sides(_dimensions(model)["llm_features_dim"])


def _dimensions(patcher: comfy.model_patcher.ModelPatcher) -> dict:
    config = patcher.model.model_config.unet_config
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "intermediate_size")
    return {key: config[key] for key in (*keys, "llm_features_dim")}
