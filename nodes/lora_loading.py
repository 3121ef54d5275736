"""LoRAs on a quantized model as a low-rank path beside each linear.

``y = W x + up (down x)``: the quantized weight is not touched, so that nothing is encoded again
and removal is exact. The path goes in through the host's injections, as forward hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import comfy.model_patcher
import torch
from comfy.patcher_extension import PatcherInjection
from torch import Tensor

from ..checkpoint.folding import Folding
from ..errors import Ideogram4QuantError
from .headers import open_header
from .lora_files import LowRank, stack
from .model_loading import source_of

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


def add_lora(
    patcher: comfy.model_patcher.ModelPatcher, updates: Mapping[str, LowRank], strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with these updates on top of those it already has.

    The updates are of the original model; they are mapped where a model is in another basis.
    """
    if not updates or strength == 0.0:
        return patcher
    folding = remaining_folding(patcher)
    if folding is not None:
        updates = {n: LowRank(*folding.low_rank(n, u.down, u.up)) for n, u in updates.items()}
    patcher = patcher.clone()
    loaded = (*(patcher.get_attachment(KEY) or ()), (updates, strength))
    patcher.set_attachments(KEY, loaded)
    modules = dict(patcher.model.diffusion_model.named_modules())
    paths = {}
    for name in {name for found, _ in loaded for name in found}:
        together = [(found[name], s) for found, s in loaded if name in found]
        paths[modules[name]] = stack(together)
    # one injection for all, so that two LoRAs on a linear cost one pair of products
    patcher.set_injections(KEY, [_SidePaths(paths).injection()])
    return patcher


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


class _SidePaths:
    """The forward hooks of one patched model, put in and taken out by the host."""

    def __init__(self, paths: Mapping[torch.nn.Module, LowRank]):
        self._paths = paths
        self._handles: list = []

    def injection(self) -> PatcherInjection:
        return PatcherInjection(inject=self._inject, eject=self._eject)

    def _inject(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        self._eject(patcher)  # clones of a patched model share these hooks
        dtype = patcher.model.get_dtype_inference()
        for module, update in self._paths.items():
            down = update.down.to(patcher.load_device, dtype)
            up = update.up.to(patcher.load_device, dtype)
            self._handles.append(module.register_forward_hook(side_path(down, up)))

    def _eject(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        while self._handles:
            self._handles.pop().remove()


def side_path(down: Tensor, up: Tensor) -> Callable[[torch.nn.Module, tuple, Tensor], Tensor]:
    """A forward hook of a linear: ``y + up (down x)``; down [r, K], up [N, r]."""

    def add_side_path(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        x = inputs[0].to(down.dtype)
        side = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
        return output + side.to(output.dtype)

    return add_side_path
