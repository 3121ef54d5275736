"""A random Ideogram 4 block in any layout, and its unfused formula as the host writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ideogram4_quant.ops import fused, layouts
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.tests.tensors import randn

EPS = 1e-5
W8A8 = LinearOptions(backend="reference", gguf_compute="w8a8")
INT8, GGUF = "Ideogram4QuantInt8", "Ideogram4QuantGGUF"
LAYOUTS: dict[str, tuple[str, dict] | None] = {
    "int8": (INT8, {}),
    "int8 rotated": (INT8, {"rotation": 256}),
    "int8 smooth rotated": (INT8, {"smooth": True, "rotation": 256}),
    "Q8_0": (GGUF, {"qtype": "Q8_0"}),
    "Q4_K": (GGUF, {"qtype": "Q4_K"}),
    "fp8": ("Ideogram4QuantFP8", {}),
    "nf4": ("Ideogram4QuantNF4", {}),
    "bf16": None,
}
MODULES = ("qkv", "o", "w1", "w2", "w3")


def encode(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if LAYOUTS[kind] is None:
        return weight.to(dtype)
    layout, options = LAYOUTS[kind]
    if options.get("smooth"):
        options = {**options, "smooth": torch.linspace(0.5, 2.0, weight.shape[1])}
    return QuantizedTensor.from_float(weight.to(dtype), layout, **options)


def random_int8(n: int, k: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A rotated int8 weight straight from random bytes: fast at real widths."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, generator=generator).add_(0.5) / (73 * k**0.5)
    return layouts.int8_tensor(q, scale, dtype=dtype, rotation=256)


@dataclass
class Block:
    """Weights of a block; ``kinds`` maps modules to layouts, ``"*"`` the rest."""

    hidden: int = 256
    heads: int = 2
    inner: int = 768
    kinds: dict[str, str] = field(default_factory=lambda: {"*": "int8 rotated"})
    bias: bool = False
    dtype: torch.dtype = torch.float32
    options: LinearOptions = W8A8
    make: Callable | None = None  # (n, k, seed, dtype) -> weight

    def __post_init__(self):
        h, f = self.hidden, self.inner
        shapes = {"qkv": (3 * h, h), "o": (h, h), "w1": (f, h), "w2": (h, f), "w3": (f, h)}
        self.weights, self.biases = {}, {}
        for seed, name in enumerate(MODULES):
            n, k = shapes[name]
            if self.make is not None:
                weight = self.make(n, k, seed, self.dtype)
            else:
                kind = self.kinds.get(name, self.kinds["*"])
                weight = encode(randn(n, k, seed=seed) / k**0.5, kind, self.dtype)
            self.weights[name] = weight
            self.biases[name] = 0.1 * randn(n, seed=seed + 10) if self.bias else None
        names = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        self.norms = {
            name: (1 + 0.1 * randn(h, seed=20 + i)).to(self.dtype) for i, name in enumerate(names)
        }
        self.modulation_weight = (0.3 * randn(4 * h, 32, seed=30) / 32**0.5).to(self.dtype)

    def to(self, device: str) -> Block:
        """The block itself, its tensors on another device."""
        for held in (self.weights, self.biases, self.norms):
            held |= {name: None if t is None else t.to(device) for name, t in held.items()}
        self.modulation_weight = self.modulation_weight.to(device)
        return self

    def inputs(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """``x`` with a few outlier channels, as the real model has, and the condition."""
        x = randn(batch, tokens, self.hidden, seed=40)
        x[..., ::61] *= 20
        return x.to(self.dtype), randn(batch, 1, 32, seed=41).to(self.dtype)

    def linear(self, name: str, x) -> Tensor:
        return linear(x, self.weights[name], self.biases[name], self.options)

    def modulation(self, condition: Tensor) -> Tensor:
        return F.linear(condition, self.modulation_weight)

    def attention(self, x) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.linear("qkv", x).view(batch, tokens, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = (F.rms_norm(part, part.shape[-1:]) for part in (q, k))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.linear("o", out.transpose(1, 2).reshape(batch, tokens, -1))

    def per_token(self, x) -> Tensor:
        """In place of attention: o of the values, which mixes no tokens."""
        return self.linear("o", self.linear("qkv", x)[..., -self.hidden :])

    def parts(self, attention: Callable | None = None, alike: bool = False) -> fused.BlockParts:
        return fused.BlockParts(
            modulation=self.modulation,
            attention=attention or self.attention,
            w1=partial(self.linear, "w1"),
            w2=partial(self.linear, "w2"),
            w3=partial(self.linear, "w3"),
            norm_weight=self.norms.__getitem__,
            eps=EPS,
            alike=alike,
        )

    def fused(self, x: Tensor, condition: Tensor, **parts) -> Tensor:
        return fused.block(x, condition, self.parts(**parts), self.options.backend)

    def unfused(self, x: Tensor, condition: Tensor, attention: Callable | None = None) -> Tensor:
        """The host's lines (Ideogram4TransformerBlock.forward), an op at a time."""

        def norm(name: str, values: Tensor) -> Tensor:
            return F.rms_norm(values, (self.hidden,), self.norms[name], EPS)

        scale1, gate1, scale2, gate2 = self.modulation(condition).chunk(4, dim=-1)
        y = (attention or self.attention)(norm("attention_norm1", x) * (1.0 + scale1))
        x = x + torch.tanh(gate1) * norm("attention_norm2", y)
        y = norm("ffn_norm1", x) * (1.0 + scale2)
        y = self.linear("w2", F.silu(self.linear("w1", y)) * self.linear("w3", y))
        return x + torch.tanh(gate2) * norm("ffn_norm2", y)

    def exact(self, x: Tensor, condition: Tensor) -> Tensor:
        """The same with every weight dequantized and fp64 throughout."""
        whole = Block(self.hidden, self.heads, self.inner, {"*": "bf16"}, self.bias, torch.float64)
        for name, weight in self.weights.items():
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            whole.weights[name] = weight.double()
        whole.norms = {name: norm.double() for name, norm in self.norms.items()}
        whole.modulation_weight = self.modulation_weight.double()
        return whole.unfused(x.double(), condition.double())
