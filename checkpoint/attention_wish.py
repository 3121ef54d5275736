"""What a file asks of the host's attention: ``attention.comfy_attention.config`` beside a layer.

uint8 JSON, such as ``{"attention": "comfy_kitchen_int8"}``. It changes no weight: newer hosts
follow it, and this pack does where the attention is left to it. Writers keep it: files in ComfyUI's
own container as those tensors, and every file of this pack in its metadata, under ``WISH_KEY``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence

from torch import Tensor

from ..errors import printable
from .files import RawTensor
from .tensor_files import TensorFiles

logger = logging.getLogger(__name__)

NAME = "attention.comfy_attention.config"
_KEY = re.compile(rf".*layers\.(\d{{1,4}})\.{re.escape(NAME)}", re.DOTALL)
_LARGEST = 1 << 12  # bytes
WISH_KEY = "ideogram4.attention"
"""Metadata key of the wish, which is one of ``_KNOWN``."""
# what a file may say -> the pack's own name of that attention
_KNOWN = {"comfy_kitchen_int8": "int8"}


def attention_wish(opened: Sequence[TensorFiles]) -> str | None:
    """The pack's name of the attention that these files ask for; None where they ask for none.

    A wish that is not known, or that layers tell differently, is no wish, and one log line.
    """
    said = {raw.read().numpy().tobytes(): key for key, raw in _told(opened).items()}
    stated = {_KNOWN.get(str(files.metadata.get(WISH_KEY))) for files in opened}
    if not said:
        return stated.pop() if len(stated) == 1 else None
    found = {_asked(text) for text in said}
    known = {_KNOWN.get(name) for name in found if name is not None}
    if len(found) == 1 and None not in known and known:
        return known.pop()
    logger.warning(
        "%s: what it asks of the attention (%s in %s) is not followed",
        opened[0].path,
        ", ".join(sorted(printable(str(name)) for name in found)),
        printable(next(iter(said.values()))),
    )
    return None


def told_name(wish: str) -> str:
    """How a file says a wish of that name of this pack's."""
    return next(told for told, name in _KNOWN.items() if name == wish)


def attention_configs(opened: Sequence[TensorFiles]) -> dict[str, Tensor]:
    """What the files say, as they say it: canonical name -> uint8 [n], understood or not."""
    return {name: raw.read().reshape(-1) for name, raw in _told(opened).items()}


def _told(opened: Sequence[TensorFiles]) -> dict[str, RawTensor]:
    found: dict[str, RawTensor] = {}
    for tensor_files in opened:
        for key, raw in tensor_files.tensors.items():
            match = _KEY.fullmatch(key)
            if match is not None and raw.dtype == "U8" and raw.nbytes <= _LARGEST:
                found.setdefault(f"layers.{int(match[1])}.{NAME}", raw)
    return found


def _asked(text: bytes) -> str | None:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    name = value.get("attention") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None
