"""Where a loaded model came from: kept on it, so that it can be loaded again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_patcher

from ..checkpoint import Checkpoint
from ..ops.linear import LinearOptions
from .headers import open_header
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
    one_branch: bool | None = None  # the user's word for whether it needs no guidance
    fused: bool = False  # blocks run fused: see fused_blocks


def header_of(source: ModelSource) -> Checkpoint:
    """The header of its file, as it was opened when the model was loaded."""
    copy = source.copy if source.trusted else None
    return open_header(source.path, source.bases, copy=copy, one_branch=source.one_branch)


def source_of(patcher: comfy.model_patcher.ModelPatcher) -> ModelSource | None:
    """Where a model came from; None for a model of another loader."""
    return patcher.get_attachment(ATTACHMENT)
