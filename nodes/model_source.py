"""Where a loaded model came from: kept on it, so that it can be loaded again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_patcher

from ..ops.linear import LinearOptions
from .report import HOST_ATTENTION

ATTACHMENT = "ideogram4_quant"


@dataclass(frozen=True)
class ModelSource:
    """Everything that decides what a loaded model is; also how the host can load it again."""

    path: Path
    copy: str
    bases: tuple[Path, ...] = ()
    options: LinearOptions = field(default_factory=LinearOptions)
    trusted: bool = False  # the user's word for the copy goes before the file's name
    attention: str = HOST_ATTENTION
    fused: bool = False  # blocks run fused: see fused_blocks


def source_of(patcher: comfy.model_patcher.ModelPatcher) -> ModelSource | None:
    """Where a model came from; None for a model of another loader."""
    return patcher.get_attachment(ATTACHMENT)
