"""A picture that came out as no numbers, and the weight that made it so.

A damaged file opens where its headers are whole, and one NaN among its scales makes every value of
a picture NaN, which is saved as black. Looking at all weights costs seconds, so it is done only
then.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, OpError


def check_latents(latents: Tensor, models: Mapping[str, torch.nn.Module | None]) -> None:
    """OpError for latents with NaN or infinity, with the first weight of ``models`` (by the name of
    the copy; None: there is none) that holds some.
    """
    if bool(latents.isfinite().all()):
        return
    for copy, model in models.items():
        for name, weight in () if model is None else model.named_parameters():
            if not _finite(weight.detach()):
                raise OpError(
                    f"the picture is no picture: a weight of the {copy} copy holds NaN or infinity",
                    tensor=name,
                    found="values that are no numbers",
                    needed="numbers",
                    hint=CHECK_DOWNLOAD,
                )
    raise OpError(
        "the picture is no picture: its values ran into NaN or infinity",
        found="weights that are all numbers",
        hint="Leave out LoRAs, or lower their strength, and nodes that change the model; if it is "
        "so without them, run `ideogram4-quant selftest`.",
    )


def _finite(weight: Tensor) -> bool:
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    if values.is_floating_point() and values.dtype.itemsize == 1:
        values = values.float()
    return bool(values.isfinite().all())
