"""A linear layer that takes its weight as it lies in the file, and the code that puts it in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from os import PathLike

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ..ops.errors import CheckpointError
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
    """The device asked for; without one, CUDA where there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype:
    """The compute dtype asked for; without one, fp32 on a CPU (bf16 is slower there), else bf16."""
    if dtype is not None:
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def install_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    file: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    options: LinearOptions | None = None,
    file_name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Replaces every ``nn.Linear`` of a model on the meta device and fills all other parameters.

    Linear weights keep their storage: a QuantizedTensor stays quantized, bf16 stays bf16. Biases,
    norms and embeddings get the compute ``dtype``. ``file_name_of`` maps a parameter's name to the
    checkpoint's. CheckpointError names the first tensor that is missing or of another shape;
    tensors that the model has no place for are reported by a warning.
    """
    expected = {file_name_of(name): p.shape for name, p in model.named_parameters()}
    for name, shape in expected.items():
        if name not in state:
            raise CheckpointError(
                "a weight is missing",
                file=file,
                tensor=name,
                needed=list(shape),
                hint="Give the complete checkpoint, or the base file that holds the rest.",
            )
        if state[name].shape != shape:
            raise CheckpointError(
                "wrong shape",
                file=file,
                tensor=name,
                found=list(state[name].shape),
                needed=list(shape),
            )
    if extra := sorted(state.keys() - expected.keys()):
        _log.warning("%s: %d tensors without a place, such as %s", file, len(extra), extra[0])

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = state[file_name_of(f"{path}.weight")].to(device)
            if isinstance(weight, QuantizedTensor):
                weight = weight.to(dtype=dtype)  # what it decodes to; the codes stay as they are
            bias = None
            if module.bias is not None:
                bias = _dense(state[file_name_of(f"{path}.bias")]).to(device, dtype)
            model.set_submodule(path, QuantLinear(weight, bias, options))
        else:
            for name, _ in list(module.named_parameters(recurse=False)):
                value = _dense(state[file_name_of(f"{path}.{name}")]).to(device, dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.eval()
