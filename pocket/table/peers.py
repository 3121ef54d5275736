"""Other programs' quantizers on the same linears, each run by its own code.

An extra: none of these packages is a dependency, and the row of one that is not installed is left
out with the reason. What a peer calibrates on are the captions that ours calibrates on.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...ops.layouts import gguf_tensor
from ...ops.linear import linear

#: (fp32 linear [N, K], second moments of its inputs fp32 [K, K] or None) -> the peer's linear
Make = Callable[[nn.Linear, "Tensor | None"], nn.Module]


@dataclass(frozen=True)
class Peer:
    """How one peer quantizes a linear of the blocks.

    ``package``: its distribution; ``settings``: what it was told, in its own names; ``moments``:
    whether ``make`` takes second moments of the inputs; ``bits``: a weight in its files, with
    16-bit scales, where what it holds here is not packed or has fp32 ones (None: counted).
    """

    package: str
    settings: str
    make: Make
    moments: bool = False
    bits: float | None = None

    @property
    def version(self) -> str | None:
        """The installed version; None where the package is not there."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    @property
    def stamp(self) -> str:
        """Package, version and settings: what a row was made by."""
        return f"{self.package} {self.version}: {self.settings}"

    def linear(self, weight: Tensor, moments: Tensor | None) -> nn.Module:
        """The peer's linear of a weight [N, K], which is read as fp32."""
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        return self.make(layer, moments).requires_grad_(False)


class Biased(nn.Module):
    """A peer's linear and the model's bias, which no system quantizes."""

    def __init__(self, own: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.own = own
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def parts(module: nn.Module) -> dict[str, Tensor]:
    """Every plain tensor that a peer's linear keeps, tensors within tensors included."""
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            found.update((f"{name}{at}", part) for at, part in _plain(value))
    return found


def _plain(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(value):
        yield "", value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        for deeper, part in _plain(getattr(value, name)):
            yield f".{name}{deeper}", part


def _orbitquant(weight_bits: int, activation_bits: int) -> Make:
    """Codes by its GPTQ from the inputs' moments; multiplied as its reference path does."""

    def make(layer: nn.Linear, moments: Tensor | None) -> nn.Module:
        # The reference path needs no compiled kernels; without this it looks for them on the web.
        os.environ.setdefault("ORBITQUANT_KERNELS_AUTOFETCH", "0")
        from orbitquant import OrbitQuantConfig, OrbitQuantLinear
        from orbitquant.gptq import load_rounded_codes, round_groups

        config = OrbitQuantConfig(
            weight_bits=weight_bits, activation_bits=activation_bits, runtime_mode="dequant_bf16"
        )
        made = OrbitQuantLinear.from_linear(layer, config=config, module_name="linear")
        # Its collector keeps E[(Rx)(Rx)^T]: both sides of the moments, rotated by its own rotation.
        turn = made.rotation.apply_to_activations
        rotated = {"linear": turn(turn(moments.float()).t().contiguous()).t().contiguous()}
        holder = nn.ModuleDict({"linear": layer})
        codes = round_groups(holder, [["linear"]], rotated, config, release=False)
        load_rounded_codes(nn.ModuleDict({"linear": made}), codes)
        return made

    return make


class _Blocks(nn.Module):
    """GGUF blocks, multiplied with fp32 activations."""

    def __init__(self, blocks: Tensor, qtype: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks)
        self.dense = gguf_tensor(blocks, qtype, shape, dtype=torch.float32).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense)


def _ggml(qtype: str) -> Make:
    """Blocks by ggml's encoder with an importance matrix: the inputs' mean squares."""

    def make(layer: nn.Linear, moments: Tensor | None) -> nn.Module:
        import ggml

        weight = layer.weight.detach().float().contiguous()
        rows, columns = weight.shape
        kind = getattr(ggml, f"GGML_TYPE_{qtype}")
        out = torch.zeros(rows, ggml.ggml_row_size(kind, columns), dtype=torch.uint8)
        importance = moments.diagonal().float().contiguous()
        ggml.ggml_quantize_init(kind)
        ggml.ggml_quantize_chunk(
            kind,
            _floats(weight),
            ctypes.c_void_p(out.data_ptr()),
            0,
            rows,
            columns,
            _floats(importance),
        )
        return _Blocks(out, qtype, (rows, columns))

    return make


def _floats(tensor: Tensor) -> object:
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))


def _sdnq(**settings: object) -> Make:
    def make(layer: nn.Linear, _: Tensor | None) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        # The two minima are lowered: the pocket model's linears are below what it quantizes.
        found = sdnq_post_load_quant(
            nn.ModuleDict({"linear": layer}),
            torch_dtype=torch.float32,
            add_skip_keys=False,
            quantization_device="cpu",
            return_device="cpu",
            minimum_allowed_numel=1,
            minimum_allowed_channel_size=1,
            **settings,
        )
        return found["linear"]

    return make


def _torchao_int8(layer: nn.Linear, _: Tensor | None) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _by_torchao(layer, Int8DynamicActivationInt8WeightConfig())


def _torchao_int4(layer: nn.Linear, _: Tensor | None) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return _by_torchao(layer, IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)))


def _by_torchao(layer: nn.Linear, config: object) -> nn.Module:
    from torchao.quantization import quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, config)
    return holder[0]


def _hqq(layer: nn.Linear, _: Tensor | None) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def _quanto(layer: nn.Linear, _: Tensor | None) -> nn.Module:
    from optimum.quanto import freeze, qint4, quantize

    holder = nn.Sequential(layer)
    quantize(holder, weights=qint4)
    freeze(holder)
    return holder[0]


def _bitsandbytes(layer: nn.Linear, _: Tensor | None) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compress_statistics": True, "quant_type": "nf4"}
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=False,
        compute_dtype=torch.float32, **options,
    )  # fmt: skip
    made.weight = Params4bit(layer.weight.data, requires_grad=False, module=made, **options)
    return made.to("cpu")


_GPTQ = "GPTQ on E[xx^T] in full, damp 0.01, act_order, runtime_mode dequant_bf16"
_IMATRIX = "ggml_quantize_chunk with imatrix (mean squares of the inputs)"
_PUBLISHED = {
    "weights_dtype": "uint4",
    "use_dynamic_quantization": True,
    "use_hadamard": True,
    "hadamard_group_size": 128,
}
_INT8 = {"weights_dtype": "int8", "use_quantized_matmul": True, "use_hadamard": True}

#: Row of the table -> the peer.
PEERS: Mapping[str, Peer] = {
    "OrbitQuant W8A8, GPTQ": Peer(
        "orbitquant", f"weight_bits 8, activation_bits 8, {_GPTQ}", _orbitquant(8, 8), True
    ),
    "OrbitQuant W4A8, GPTQ": Peer(
        "orbitquant", f"weight_bits 4, activation_bits 8, {_GPTQ}", _orbitquant(4, 8), True
    ),
    "OrbitQuant W4A4, GPTQ": Peer(
        "orbitquant", f"weight_bits 4, activation_bits 4, {_GPTQ}", _orbitquant(4, 4), True
    ),
    "ggml Q6_K, imatrix": Peer("ggml-python", _IMATRIX, _ggml("Q6_K"), True),
    "ggml Q4_K, imatrix": Peer("ggml-python", _IMATRIX, _ggml("Q4_K"), True),
    "ggml IQ4_XS, imatrix": Peer("ggml-python", _IMATRIX, _ggml("IQ4_XS"), True),
    "SDNQ int8, Hadamard, int8 matmul": Peer(
        "sdnq", ", ".join(f"{k}={v}" for k, v in _INT8.items()), _sdnq(**_INT8)
    ),
    "SDNQ uint4, as published": Peer(
        "sdnq", ", ".join(f"{k}={v}" for k, v in _PUBLISHED.items()), _sdnq(**_PUBLISHED)
    ),
    "torchao int8 dynamic": Peer(
        "torchao", "Int8DynamicActivationInt8WeightConfig()", _torchao_int8
    ),
    "torchao int4, groups of 32": Peer(
        "torchao", "IntxWeightOnlyConfig(int4, PerGroup(32))", _torchao_int4, bits=4.5
    ),
    "hqq 4 bits": Peer("hqq", "nbits 4, group_size 64, axis 1", _hqq, bits=4.5),
    "quanto qint4": Peer("optimum-quanto", "quantize(weights=qint4)", _quanto, bits=4.25),
    "bitsandbytes NF4": Peer("bitsandbytes", "quant_type nf4, compress_statistics", _bitsandbytes),
}
