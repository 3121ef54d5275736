"""From a checkpoint's tensors to the host's patched model, with nothing of the host replaced."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

from ..checkpoint import Checkpoint
from ..checkpoint.attention_wish import NAME, attention_configs, told_name
from ..checkpoint.saved import WORDS
from ..ops.dispatch import AUTO
from ..ops.tuning import choices
from ..ops.tuning.autotune import Layer, Measure, inputs_of, layers_of, tune
from .attention import check as check_attention
from .attention import install
from .fused_blocks import add_fused_blocks
from .hook_loras import take_hooks
from .host_ops import make_ops, text_tensor
from .mapped_weights import check_before_use, disk_options, new_mapping, tell_host
from .model_source import ATTACHMENT, ModelSource, header_of, source_of
from .one_branch import BRANCH, words_of
from .streaming import add_streaming

__all__ = ["ModelSource", "compute_dtype", "load_model", "measured", "source_of"]

LAYERS = "ideogram4_quant_layers"


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
    header = header_of(source)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    check_attention(source.attention, device)
    dtype = compute_dtype(device)
    config = _host_config(header)
    config.set_inference_dtype(dtype, None, device=device)
    config.custom_operations = make_ops(dtype, source.options)

    progress = comfy.utils.ProgressBar(100)
    mapping = new_mapping()
    state = header.load(
        source.copy,
        dtype=dtype,
        mapping=mapping,
        progress=lambda done, total: progress.update_absolute(round(100 * done / max(total, 1))),
    )
    tell_host(state.values())
    layers = layers_of(state.values())
    _measure(layers, inputs_of(state) if source.fused else (), header, source, device, dtype)
    model = config.get_model(state, "")
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    disk = disk_options(patcher_class, mapping)
    patcher = patcher_class(model, load_device=device, offload_device=offload, **disk)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    check_before_use(_parts(model.diffusion_model), mapping)
    # what the host's save nodes would lose: they write tensors, and metadata of their own
    said = {"copy": source.copy, "config": header.config.to_dict(), **words_of(header, source)}
    if header.attention_wish is not None:
        said["attention"] = told_name(header.attention_wish)
    model.diffusion_model.register_buffer(WORDS, text_tensor(said))
    _keep_attention_configs(model.diffusion_model, header)
    patcher.cached_patcher_init = (load_model, (source,))
    patcher.set_attachments(ATTACHMENT, source)
    patcher.set_attachments(LAYERS, layers)
    patcher.set_attachments(BRANCH, header.one_branch)
    install(patcher, source.attention)
    take_hooks(patcher)
    add_streaming(patcher)
    if source.fused:
        add_fused_blocks(patcher, source.options.backend)
    return patcher


def measured(patchers: Iterable[comfy.model_patcher.ModelPatcher]) -> choices.Table:
    """What was measured for these models on the devices that they compute on."""
    found: list[choices.Measurement] = []
    for patcher in patchers:
        shapes = {(layer.n, layer.k) for layer in patcher.get_attachment(LAYERS) or ()}
        table = choices.table(patcher.load_device)
        whole = (choices.ATTENTION, choices.ROPE)
        found += (m for m in table if m.key.op in whole or (m.key.n, m.key.k) in shapes)
    return choices.Table(found)


def _measure(
    layers: tuple[Layer, ...],
    inputs: tuple[tuple[str, Layer], ...],
    header: Checkpoint,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Time what is left to ``auto``, before the model takes its memory; known results cost nothing.

    They are kept in the host's user folder, out of reach of its web server.
    """
    folder = Path(folder_paths.get_system_user_directory("ideogram4_quant"))
    config = header.config
    heads = (config.num_attention_heads, config.attention_head_dim)
    tune(
        layers,
        device,
        dtype,
        Measure(folder, make_room=lambda nbytes: management.free_memory(nbytes, device)),
        options=source.options,
        heads=heads if source.attention == AUTO else None,
        rope=heads if source.fused else None,
        inputs=inputs,
    )


def _parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What runs within a pass: the transformer's blocks and the modules beside them. Not the model
    itself: torch.compile would make a graph of its own of what it hooks around it."""
    beside = [module for name, module in model.named_children() if name != "layers"]
    return [*beside, *model.layers]


def _keep_attention_configs(model: torch.nn.Module, header: Checkpoint) -> None:
    """What the file asks of the attention, where hosts that follow it look for it when saved."""
    asked = attention_configs(header.tensor_files)
    for number, layer in enumerate(model.layers):
        text = asked.get(f"layers.{number}.{NAME}")
        if text is not None:
            _, child, buffer = NAME.split(".")
            holder = torch.nn.Module()
            holder.register_buffer(buffer, text)
            layer.attention.add_module(child, holder)


def _host_config(header: Checkpoint) -> comfy.supported_models.Ideogram4:
    """The host's description of the model, in the size that the file has."""
    dimensions = header.config.to_dict()
    shape = {key: dimensions.pop(key) for key in ("in_channels", "num_layers")}
    sized = type(
        "Ideogram4", (comfy.supported_models.Ideogram4,), {"unet_extra_config": dimensions}
    )
    return sized({"image_model": "ideogram4", **shape})
