"""The host's operations with linears that keep, and run on, this pack's quantized layouts.

The host's own loader of quantized linears knows a fixed list of formats. A file reader that puts
``QuantizedTensor`` objects straight into the state dict needs a linear that leaves them alone;
everything else (casts, offload, low-rank patches, dynamic memory) stays the host's.
"""

from __future__ import annotations

import json

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ..errors import OpError
from ..ops import layouts as _layouts  # noqa: F401  (registers the layouts with comfy-kitchen)
from ..ops.fused import Activation, dense
from ..ops.linear import LinearOptions, linear

# layout name -> the name under which the host's saver and its forward look the format up
FORMATS = {
    "Ideogram4QuantInt8": "ideogram4_quant_int8",
    "Ideogram4QuantGGUF": "ideogram4_quant_gguf",
    "Ideogram4QuantFP8": "ideogram4_quant_fp8",
    "Ideogram4QuantNF4": "ideogram4_quant_nf4",
    "Ideogram4QuantFoldedInt8": "ideogram4_quant_folded_int8",
    "Ideogram4QuantFoldedGGUF": "ideogram4_quant_folded_gguf",
    # the host's own containers, in layouts that are comfy-kitchen's and more
    "Ideogram4QuantW4A8": "ideogram4_quant_w4a8",
    "Ideogram4QuantW4A4": "ideogram4_quant_w4a4",
    "Ideogram4QuantNVFP4": "ideogram4_quant_nvfp4",
    "Ideogram4QuantMXFP8": "ideogram4_quant_mxfp8",
    "Ideogram4QuantAWQ": "ideogram4_quant_awq",
}
_STORAGE = {
    "Ideogram4QuantInt8": torch.int8,
    "Ideogram4QuantGGUF": torch.uint8,
    "Ideogram4QuantFP8": torch.float8_e4m3fn,
    "Ideogram4QuantNF4": torch.uint8,
    "Ideogram4QuantFoldedInt8": torch.int8,
    "Ideogram4QuantFoldedGGUF": torch.uint8,
    "Ideogram4QuantW4A8": torch.int8,
    "Ideogram4QuantW4A4": torch.int8,
    "Ideogram4QuantNVFP4": torch.uint8,
    "Ideogram4QuantMXFP8": torch.float8_e4m3fn,
    "Ideogram4QuantAWQ": torch.int8,
}
for _layout, _format in FORMATS.items():
    QUANT_ALGOS.setdefault(
        _format,
        {
            "storage_t": _STORAGE[_layout],
            "parameters": set(),
            "comfy_tensor_layout": _layout,
            # the kernels quantize the activations themselves, fused with smoothing and rotation
            "quantize_input": False,
        },
    )


def is_ours(weight: object) -> bool:
    """True for a quantized weight in one of this pack's layouts."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls in FORMATS


def text_tensor(said: dict) -> Tensor:
    """A description as the uint8 tensor of JSON that the host keeps in files."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


class _QuantizedLinear:
    """What the host's mixed-precision linear, which this is mixed into, lacks for our layouts."""

    takes_activations = True
    weight_dtype: torch.dtype  # of ``make_ops``, as are the options
    linear_options: LinearOptions | None

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        key = prefix + "weight"
        weight = state_dict.get(key)
        if not is_ours(weight):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
            return
        if tuple(weight.shape) != (self.out_features, self.in_features):
            errors.append(
                f"{key}: found {tuple(weight.shape)}, "
                f"needed {(self.out_features, self.in_features)}"
            )
            return
        state_dict.pop(key)
        self.layout_type = weight._layout_cls
        self.quant_format = FORMATS[weight._layout_cls]
        weight = weight.to(device=self.factory_kwargs["device"], dtype=self.weight_dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        # the bias the plain way, past the host's handling of quantized weights
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if key in missing:
            missing.remove(key)

    def __getattr__(self, name: str) -> object:
        """As a module's; OpError where the host's merging nodes take a quantized weight apart.

        They ask for ``set_NAME`` of everything in the state dict, and patch each part by itself.
        What all formats have, ``comfy_quant``, is the first of them.
        """
        if name == "set_comfy_quant" and is_ours(self._parameters.get("weight")):
            raise OpError(
                "ComfyUI takes this model's weights apart to merge or to hook them, and a "
                "quantized one is whole only",
                hint="Load BF16 files for the models to merge, or at least for every one but the "
                "first, and quantize the result.",
            )
        return super().__getattr__(name)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if destination is not None and is_ours(self.weight):
            destination[f"{prefix}comfy_quant"] = None  # ahead of the parts: see __getattr__
        sd = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        if is_ours(self.weight):
            # the host writes a format's name; what of it the tensors do not tell is ours to say
            said = self.weight.layout_cls.description(self.weight._params)
            sd[f"{prefix}comfy_quant"] = text_tensor(said)
        return sd

    def forward_comfy_cast_weights(
        self, input, compute_dtype=None, want_requant=False, weight_only_quant=False
    ):
        if not (weight_only_quant and is_ours(self.weight)):
            return super().forward_comfy_cast_weights(
                input, compute_dtype, want_requant, weight_only_quant
            )
        # The host's lines but for a cast to the dtype of the input, which these layouts do
        # not need, and after which torch.compile no longer sees what the weight is.
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self,
            dtype=self.weight.dtype,
            device=input.device,
            bias_dtype=input.dtype,
            offloadable=True,
            compute_dtype=compute_dtype,
            want_requant=True,
        )
        try:
            return self._forward(input, weight, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def _forward(self, x: Tensor | Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_ours(weight) or isinstance(x, QuantizedTensor):
            return super()._forward(dense(x), weight, bias)
        if self.linear_options is None:
            weight = weight.dequantize().to(x.dtype)
            return torch.nn.functional.linear(dense(x), weight, bias)
        return linear(x, weight, bias, self.linear_options)


def make_ops(compute_dtype: torch.dtype, options: LinearOptions | None = None) -> type:
    """The host's mixed-precision operations with a linear that runs this pack's layouts.

    compute_dtype: what dense weights are stored in and patches are computed in. options: how a
    quantized linear is run; None dequantizes the weight and multiplies densely, which is what a
    text encoder gets (its activations stay unquantized).
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class Operations(base):
        class Linear(_QuantizedLinear, base.Linear):
            weight_dtype = compute_dtype
            linear_options = options

    return Operations
