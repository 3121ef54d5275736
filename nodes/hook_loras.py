"""The host's hook LoRAs, which act on one conditioning, beside the weights of a quantized model.

The host would patch the weights anew at each change of conditioning, and cannot where a linear
keeps quantized weights. So their updates become small models as those of this pack's own LoRAs, and
each pass gets those of its conditioning, as strong as the hooks are at its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import comfy.hooks
import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..checkpoint.copies import CONDITIONAL
from ..checkpoint.loras import LowRank, parse_lora, refuse_changes
from ..errors import OpError
from . import injected
from .lora_loading import in_its_basis, linear_shapes, other_shapes
from .low_rank_model import load_low_rank, unload_with
from .model_source import source_of

KEY = "ideogram4_quant_hooks"
_HINT = "Take the hook off this conditioning, and use Load LoRA for Ideogram 4 for the LoRA."


def take_hooks(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have hook LoRAs act beside this model's weights, where the host could not patch them.

    Sampling then raises OpError for a hook that is no LoRA, and CheckpointError and its kinds for a
    LoRA that does not fit, or cannot act beside the weights.
    """
    for kind, callback in (
        (CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, _register),
        (CallbacksMP.ON_CLEANUP, _forget),
        (CallbacksMP.ON_DETACH, unload_with(KEY)),
    ):
        patcher.remove_callbacks_with_key(kind, KEY)
        patcher.add_callback_with_key(kind, KEY, callback)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _with_current_hooks)


def refuse_hooks(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have OpError raised where a hook LoRA is for this encoder, whose weights may be quantized."""

    def refuse(patcher, hooks, *_) -> None:
        if any(patcher.hook_patches.get(hook.hook_ref) for hook in _weights(hooks)):
            raise OpError(
                "a hook on the text encoder changes its weights, which this encoder cannot do",
                found="a LoRA for the text encoder",
                hint="Set the strength_clip of Create Hook LoRA to 0.",
            )

    kind = CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES
    patcher.add_callback_with_key(kind, KEY, refuse)


def _register(
    patcher: comfy.model_patcher.ModelPatcher,
    hooks: comfy.hooks.HookGroup,
    target: dict,
    model_options: dict,
    registered: comfy.hooks.HookGroup,
) -> None:
    """At the start of a run, when the host has made weight patches of the hooks."""
    found = _weights(hooks)
    if not found or not _is_mixed(patcher):
        return
    small = []
    for hook in found:
        patcher.hook_patches[hook.hook_ref] = {}  # nothing is left to the host
        if hook.strength_model != 0.0 or not hook.hook_keyframe.is_empty():
            small.append(_load(patcher, hook))
    patcher.set_additional_models(KEY, small)
    # scaled to nothing but in the passes of a conditioning that brings a hook
    injected.follow(patcher, KEY, _side_paths, same_results=True)


def _load(
    patcher: comfy.model_patcher.ModelPatcher, hook: comfy.hooks.WeightHook
) -> comfy.model_patcher.ModelPatcher:
    return load_low_rank(
        ((in_its_basis(patcher, _updates(patcher, hook)), 1.0),),
        patcher.model.get_dtype_inference(),
        patcher.load_device,
        patcher.offload_device,
        hook.hook_ref,
    )


def _updates(
    patcher: comfy.model_patcher.ModelPatcher, hook: comfy.hooks.WeightHook
) -> dict[str, LowRank]:
    if not hook.need_weight_init or not isinstance(hook.weights, dict):
        raise OpError(
            "a hook on the conditioning replaces weights, which a quantized model cannot do",
            found="a model as a LoRA",
            needed="a LoRA of two halves (lora_A and lora_B, or lora_down and lora_up)",
            hint=_HINT,
        )
    file = parse_lora(
        hook.weights, linear_shapes(patcher), "the LoRA of a hook", others=other_shapes(patcher)
    )
    refuse_changes(file, "the LoRA of a hook", "which a hook cannot do", _HINT)
    source = source_of(patcher)
    copy = CONDITIONAL if source is None else source.copy
    updates = file.for_copy(copy, copy)
    if not updates:
        raise OpError(
            "the LoRA of a hook is for the other copy of the model",
            found=", ".join(str(name) for name in file.updates),
            needed=copy,
            hint=_HINT,
        )
    return updates


def _is_mixed(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether linears may keep quantized weights; the host's hooks cannot set those."""
    return any(hasattr(m, "set_weight") for m in patcher.model.diffusion_model.modules())


def _side_paths(
    patcher: comfy.model_patcher.ModelPatcher, modules: injected.Modules
) -> Iterator[Callable[[], None]]:
    for small in patcher.get_additional_models_with_key(KEY):
        small.model.set_scale(0.0)
        for name, path in small.model.side_paths():
            yield modules.hook(name, path.hook)


def _with_current_hooks(executor, *args, **kwargs):
    """One pass of a model, with the updates of the hooks that the host has set for it."""
    patcher = executor.class_obj.current_patcher
    small = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
    if not small:
        return executor(*args, **kwargs)
    current = patcher.current_hooks
    strengths = {} if current is None else {h.hook_ref: h.strength_model for h in _weights(current)}
    try:
        for one in small:
            one.model.set_scale(strengths.get(one.model.label, 0.0))
        return executor(*args, **kwargs)
    finally:
        for one in small:
            one.model.set_scale(0.0)


def _weights(hooks: comfy.hooks.HookGroup) -> list[comfy.hooks.WeightHook]:
    return hooks.get_type(comfy.hooks.EnumHookType.Weight)


def _forget(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """After a run: hooks belong to its conditioning, not to the model."""
    if patcher.get_additional_models_with_key(KEY):
        with patcher.use_ejected():
            patcher.remove_additional_models(KEY)
