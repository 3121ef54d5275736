"""Weights of mapped files in the host: no copy at loading, and a look at the files before each use.

The host's dynamic memory reads a weight from its file where the tensor says which part of which
file it is, straight into pinned memory or onto the device; newer hosts decide by the disk's speed
whether to keep what they read (``fast_disk``). Both are told here, as the host's own loader tells
them; a host that does not ask takes no notice.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator

import comfy.memory_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..checkpoint.mapped import FileMapping, MappedFile, origin

logger = logging.getLogger(__name__)


def new_mapping() -> FileMapping | None:
    """Where one load's files are mapped; None where the user asked for copies (--disable-mmap)."""
    return None if comfy.utils.DISABLE_MMAP else FileMapping()


def tell_host(tensors: Iterable[Tensor]) -> None:
    """Write on the memory of mapped tensors which part of which file it is, in the host's words."""
    part = getattr(comfy.memory_management, "TensorFileSlice", None)
    for tensor in tensors:
        plain = tensor._qdata if isinstance(tensor, QuantizedTensor) else tensor
        found = origin(plain)
        if found is None:
            continue
        storage = plain.untyped_storage()
        storage._comfy_source_path = str(found.file.path)
        if part is not None:
            storage._comfy_tensor_file_slice = part(
                found.file.handle, found.file.lock, found.offset, found.nbytes
            )


def disk_options(patcher_class: type, mapping: FileMapping | None) -> dict[str, bool]:
    """What a newer host's patcher is told of the disk; {} for one that does not ask."""
    if mapping is None or "fast_disk" not in inspect.signature(patcher_class.__init__).parameters:
        return {}
    try:
        storage = importlib.import_module("comfy.storage")
    except ImportError:
        return {}
    return {"fast_disk": storage.model_fast_disk(sorted({str(f.path) for f in mapping.files}))}


def check_before_use(blocks: Iterable[nn.Module], mapping: FileMapping | None) -> None:
    """Have each of ``blocks`` look, before it runs, whether its files are as they were mapped.

    Only while one of its weights is in main memory. Raises, there, what `MappedFile.check` raises.
    """
    if mapping is None or not mapping.files:
        return
    for block in blocks:
        block.register_forward_pre_hook(_Look(block, mapping.files))


class _Look:
    """A forward pre-hook; it is gone from a compiled graph, which it would break."""

    def __init__(self, block: nn.Module, files: tuple[MappedFile, ...]):
        self._parameters = [m._parameters for m in block.modules() if "weight" in m._parameters]
        self._files = files

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and self._in_memory():
            for file in self._files:
                file.check()

    def _in_memory(self) -> bool:
        return any(
            p["weight"] is not None and p["weight"].device.type == "cpu" for p in self._parameters
        )


def tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """The plain tensors that hold a module's weights."""
    for parameter in module.parameters():
        if isinstance(parameter, QuantizedTensor):
            yield parameter._qdata
        else:
            yield parameter


def files_of(module: nn.Module) -> frozenset[MappedFile]:
    """The mapped files that weights of ``module`` still lie in."""
    found = (origin(tensor) for tensor in tensors_in(module) if tensor.device.type == "cpu")
    return frozenset(place.file for place in found if place is not None)
