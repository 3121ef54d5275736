"""A linear layer that takes its weight as it lies in the file, and the code that puts it in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from os import PathLike

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ..errors import CheckpointError, OpError
from ..ops.linear import LinearOptions, linear

_log = logging.getLogger(__name__)


class QuantLinear(nn.Module):
    """y = x W^T + b for a dense or quantized W [N, K]; x [..., K] -> y [..., N] in x's dtype."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, options: LinearOptions | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.options = options or LinearOptions()

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.options)

    def extra_repr(self) -> str:
        kind = type(self.weight.data).__name__
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


def default_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; without one, CUDA where there is one, else the CPU.

    OpError for a name that torch does not know, and for CUDA where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise OpError("no such device", found=repr(device), needed="cpu, cuda, cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OpError("CUDA is not available here", found=repr(str(device)), needed="cpu")
    return found


def default_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype:
    """The compute dtype asked for; without one, bf16 where the device computes it, else fp32.

    fp32 on a CPU (bf16 is slower on most) and on NVIDIA before Ampere: int8 layers then take and
    give fp32, and so the residual is fp32, as fp16 overflows in this model.
    """
    if dtype is not None:
        return dtype
    old = device.type == "cuda" and not torch.version.hip and _capability(device) < (8, 0)
    return torch.float32 if device.type == "cpu" or old else torch.bfloat16


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _lean(weight: Tensor) -> Tensor:
    """An fp32 weight in bf16 where bf16 holds it exactly: half the memory, cast at each call."""
    if weight.dtype != torch.float32:
        return weight
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else weight


def install_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    file: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    options: LinearOptions | None = None,
    file_name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Replaces every ``nn.Linear`` of a model on the meta device and fills it as tensors come.

    ``tensors``: (checkpoint name, tensor), one held at a time beside the model. Linear weights keep
    their storage: a QuantizedTensor stays quantized, bf16 stays bf16. Everything else gets the
    compute ``dtype``. ``file_name_of`` maps a parameter's name to the checkpoint's. CheckpointError
    names the first tensor that is missing or of another shape; tensors that the model has no place
    for are reported by a warning.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, QuantLinear(module.weight, module.bias, options))
    places = {file_name_of(name): name for name, _ in model.named_parameters()}
    extra = []
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None:
            extra.append(name)
            continue
        path, _, leaf = place.rpartition(".")
        module = model.get_submodule(path)
        needed = getattr(module, leaf).shape
        if tensor.shape != needed:
            raise CheckpointError(
                "wrong shape", file=file, tensor=name, found=list(tensor.shape), needed=list(needed)
            )
        is_weight = leaf == "weight" and isinstance(module, QuantLinear)
        value = _stored(tensor, is_weight, device, dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if places:
        raise CheckpointError(
            f"{len(places)} weights are missing",
            file=file,
            tensor=next(iter(places)),
            hint="Give the complete checkpoint, or the base file that holds the rest.",
        )
    if extra:
        _log.warning("%s: %d tensors without a place, such as %s", file, len(extra), extra[0])
    model.eval()


def _stored(tensor: Tensor, is_weight: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor as the model keeps it."""
    quantized = isinstance(tensor, QuantizedTensor)
    if not is_weight:
        return (tensor.dequantize() if quantized else tensor).to(device, dtype)
    if quantized:
        # The dtype is what it decodes to; the codes stay as they are.
        return tensor.to(device).to(dtype=dtype)
    return _lean(tensor).to(device)
