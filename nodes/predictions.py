"""What one copy predicts of the latents, by the host or by the function that a node put there."""

from __future__ import annotations

import comfy.model_base
import comfy.samplers
from torch import Tensor


def predict(
    model: comfy.model_base.BaseModel, conds: list, x: Tensor, timestep: Tensor, options: dict
) -> list[Tensor]:
    """One of [conditional, unconditional], the other None, by the host or the function that a node
    put in its place, as SkipLayerGuidanceDiTSimple does."""
    function = options.get("sampler_calc_cond_batch_function")
    if function is None:
        return comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
    return function(
        {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": options}
    )
