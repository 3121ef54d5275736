"""From a checkpoint's tensors to the host's patched model, with nothing of the host replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch

from ..checkpoint import Checkpoint
from ..ops.errors import CorruptFileError, PairMismatchError
from ..ops.linear import LinearOptions
from .headers import open_header
from .host_ops import make_ops

ATTACHMENT = "ideogram4_quant"
# The image-only pass never reads these, and some files of the unconditional copy leave them out.
_TEXT_ONLY = ("llm_cond_proj.", "llm_cond_norm.")


@dataclass(frozen=True)
class ModelSource:
    """Everything that decides what a loaded model is; also how the host can load it again."""

    path: Path
    copy: str
    base: Path | None = None
    options: LinearOptions = field(default_factory=LinearOptions)


@dataclass(frozen=True)
class ModelInfo:
    """What travels with a loaded model, for the guider's checks and the reports."""

    source: ModelSource
    level: str
    layout: str
    copy_reason: str
    nbytes: int


def info_of(patcher: comfy.model_patcher.ModelPatcher) -> ModelInfo | None:
    """The pack's note on a model that it loaded; None for a model from another loader."""
    return patcher.get_attachment(ATTACHMENT)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has it, else float32: float16 overflows in this model."""
    supported = comfy.supported_models.Ideogram4.supported_inference_dtypes
    return management.unet_manual_cast(None, device, supported)


def load_model(
    source: ModelSource, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """One copy as the host's model, weights quantized as in the file.

    disable_dynamic: the host's wish for its older patcher. Raises CheckpointError and its kinds.
    """
    header = open_header(source.path, source.base, copy=source.copy)
    _check_copy(header, source)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtype = compute_dtype(device)
    config = _host_config(header)
    config.set_inference_dtype(dtype, None, device=device)
    config.custom_operations = make_ops(dtype, source.options)

    progress = comfy.utils.ProgressBar(100)
    state = header.load(
        source.copy,
        dtype=dtype,
        progress=lambda done, total: progress.update_absolute(round(100 * done / max(total, 1))),
    )
    _check_complete(state, config, source)
    nbytes = sum(t.nbytes for t in state.values())

    model = config.get_model(state, "")
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (source,))
    info = ModelInfo(source, header.level, header.layout, header.copy_reason, nbytes)
    patcher.set_attachments(ATTACHMENT, info)
    return patcher


def _check_copy(header: Checkpoint, source: ModelSource) -> None:
    if source.copy not in header.copies:
        raise PairMismatchError(
            f"this file does not hold the {source.copy} copy",
            file=source.path,
            found=", ".join(header.copies),
            needed=source.copy,
            hint=f"Pick the other file here. (Decided by: {header.copy_reason}.)",
        )


def _host_config(header: Checkpoint) -> comfy.supported_models.Ideogram4:
    """The host's description of the model, in the size that the file has."""
    dimensions = dict(header.config.to_dict())
    dimensions["mrope_section"] = list(dimensions["mrope_section"])
    shape = {key: dimensions.pop(key) for key in ("in_channels", "num_layers")}
    sized = type(
        "Ideogram4", (comfy.supported_models.Ideogram4,), {"unet_extra_config": dimensions}
    )
    return sized({"image_model": "ideogram4", **shape})


def _check_complete(state: dict, config: comfy.supported_models.Ideogram4, source: ModelSource):
    """Every weight that will be read is there: the host itself only logs what is missing."""
    settings = {k: v for k, v in config.unet_config.items() if k != "dtype"}
    with torch.device("meta"):
        skeleton = comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel(
            **settings, dtype=torch.float32, device="meta", operations=torch.nn
        )
    needed = {n for n, _ in skeleton.named_parameters()}
    if source.copy == "unconditional":
        needed = {n for n in needed if not n.startswith(_TEXT_ONLY)}
    missing = sorted(needed - state.keys())
    if missing:
        raise CorruptFileError(
            f"{len(missing)} weights are missing",
            file=source.path,
            tensor=missing[0],
            hint="Download the file again, or name a base file that holds them.",
        )
