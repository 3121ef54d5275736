"""LoRAs on a quantized model as a low-rank path beside each linear.

``y = W x + up (down x)``: the quantized weight is not touched, so that nothing is encoded again
and removal is exact. The path goes in through the host's injections, as forward hooks. What it
multiplies by is a small model of its own, which the host loads, counts and unloads as it does the
others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP

from ..checkpoint.folding import Folding
from ..checkpoint.loras import LowRank
from ..errors import Ideogram4QuantError
from . import injected
from .headers import open_header
from .low_rank_model import load_low_rank, unload_with
from .model_source import source_of

logger = logging.getLogger(__name__)
KEY = "ideogram4_quant_lora"


def linear_shapes(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, tuple[int, int]]:
    """Every linear of the transformer: canonical name -> (out_features, in_features)."""
    modules = patcher.model.diffusion_model.named_modules()
    return {
        name: (module.out_features, module.in_features)
        for name, module in modules
        if hasattr(module, "out_features") and hasattr(module, "in_features")
    }


def other_shapes(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, tuple[int, ...]]:
    """Every parameter that is no linear's weight, such as biases and norms: name -> shape."""
    model = patcher.model.diffusion_model
    linears = {f"{name}.weight" for name in linear_shapes(patcher)}
    return {n: tuple(p.shape) for n, p in model.named_parameters() if n not in linears}


def add_lora(
    patcher: comfy.model_patcher.ModelPatcher, updates: Mapping[str, LowRank], strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with these updates on top of those it already has.

    The updates are of the original model; they are mapped where a model is in another basis.
    """
    if not updates or strength == 0.0:
        return patcher
    updates = in_its_basis(patcher, updates)
    patcher = patcher.clone()
    loaded = (*(patcher.get_attachment(KEY) or ()), (updates, strength))
    patcher.set_attachments(KEY, loaded)
    small = load_low_rank(
        loaded, patcher.model.get_dtype_inference(), patcher.load_device, patcher.offload_device
    )
    patcher.set_additional_models(KEY, [small])
    injected.follow(patcher, KEY, _side_paths)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, unload_with(KEY))
    return patcher


def in_its_basis(
    patcher: comfy.model_patcher.ModelPatcher, updates: Mapping[str, LowRank]
) -> Mapping[str, LowRank]:
    """Updates of the original model as updates of this one, which may still be folded."""
    folding = remaining_folding(patcher)
    if folding is None:
        return updates
    return {n: LowRank(*folding.low_rank(n, u.down, u.up)) for n, u in updates.items()}


def remaining_folding(patcher: comfy.model_patcher.ModelPatcher) -> Folding | None:
    """What is still folded into a loaded model: nothing, unless a stock loader loaded the file.

    This pack's loader undoes it. A stock one does not, and remembers the file's path.
    """
    _, (path, *_), *_ = patcher.cached_patcher_init or (None, (None,))
    if source_of(patcher) is not None or not isinstance(path, str):
        return None
    try:
        header = open_header(path)
        return header.folding(header.copies[0])
    except (Ideogram4QuantError, OSError) as error:  # a file that only the stock loader reads
        logger.warning(
            "cannot tell whether this model is folded; the LoRA takes it as not: %s", error
        )
        return None


def _side_paths(
    patcher: comfy.model_patcher.ModelPatcher, modules: injected.Modules
) -> Iterator[Callable[[], None]]:
    for small in patcher.get_additional_models_with_key(KEY):
        for name, path in small.model.side_paths():
            yield modules.hook(name, path.hook)
