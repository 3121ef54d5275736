"""Which copies stay on the device while a picture is made.

Both copies are asked for by one request where both fit. Where only one does, they take turns, and
every second step runs them in the other order: a step then ends with the copy that the next one
begins with, which halves the moves. Where not even one fits, both stay in RAM and the host streams
their weights layer by layer. The order of loads is tested; what each costs on a GPU is unmeasured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoint.level_order import AUTO
from ..checkpoint.pairs import ALTERNATING, BOTH, STREAMED, residency
from ..errors import Ideogram4QuantError

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CHOICES = (AUTO, BOTH, ALTERNATING, STREAMED)


def choose(asked: str, sizes: tuple[int, int], working: int, memory: int) -> str:
    """``both``, ``alternating`` or ``streamed``.

    asked: one of CHOICES. sizes: bytes of the two copies. working: bytes that one pass needs beside
    them. memory: bytes of the device.
    """
    return residency(sizes, memory, working) if asked == AUTO else asked


def smaller(kept: str, copies: int = 2) -> str | None:
    """The next residency that needs less of the device; None below ``streamed``."""
    if kept == STREAMED:
        return None
    return ALTERNATING if kept == BOTH and copies > 1 else STREAMED


def whole(patcher: ModelPatcher, but: str) -> list[ModelPatcher]:
    """A copy with what is beside it on its device, such as LoRAs; without those under ``but``."""
    beside = (
        model for key, models in patcher.additional_models.items() if key != but for model in models
    )
    return [patcher, *(model for model in beside if model.load_device == patcher.load_device)]


def size(patcher: ModelPatcher, but: str) -> int:
    """Bytes of `whole`."""
    return sum(model.model_size() for model in whole(patcher, but))


class OutOfDeviceMemoryError(Ideogram4QuantError, torch.cuda.OutOfMemoryError):
    """No residency is left to try; the host, which knows the second kind, unloads its models."""


def out_of_memory(kept: str, free: int) -> OutOfDeviceMemoryError:
    """What to change. kept: the residency that failed last; free: bytes left on the device."""
    way = "" if kept == STREAMED else f"residency {smaller(kept)}, "
    return OutOfDeviceMemoryError(
        f"out of device memory in a step, with residency {kept}",
        found=f"{free / 1e9:.2f} GB free",
        hint=f"Try {way}a smaller picture or batch, a smaller level (Q4_K, IQ4_XS; below them the "
        "loss shows), or close what else uses the device.",
    )
