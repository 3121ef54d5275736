"""An Ideogram 4 block on the fused kernels.

What stands between two linears is never written out: a linear is handed an ``Activation``, which is
what its input will be, and asks for the form it multiplies. An int8 linear asks for quantized rows,
so that norm, modulation, SwiGLU, smoothing and rotation happen in the quantizer; any other asks for
values. Linears that ask for the same form share it, as w1 and w3 do. So a block of mixed kinds, a
16-bit w2 beside int8 w1 and w3, is fused where it can be and plain where it cannot.

The block takes its linears as callables and knows nothing of where their weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, prequantized
from .tuning import choices

NORMED, NORMED_SHARED, GATED = "normed", "normed for two", "gated"
INPUTS = {
    "attention.qkv": NORMED,
    "feed_forward.w1": NORMED_SHARED,
    "feed_forward.w3": NORMED_SHARED,
    "feed_forward.w2": GATED,
}
"""What the fused block hands to each linear."""


def fused_detail(kind: str, rotation: int | None) -> str:
    """``detail`` of the key (``choices``) that an input of ``kind`` is measured under."""
    return f"{kind}, rotated by {rotation}" if rotation else kind


@torch.compiler.assume_constant_result
def _where_rows_pay(
    n: int, k: int, device: torch.device, dtype: torch.dtype, detail: str
) -> tuple[tuple[float, bool], ...]:
    found = choices.table(device).where_rows_pay(n, k, choices.dtype_name(dtype), detail)
    return found or ((math.inf, dispatch.quantizes_rows(device)),)


# Of the tokens that backends were measured at, as a graph is compiled for all of them.
_TOKENS = 4608


@torch.compiler.assume_constant_result
def _makes_norms(
    n: int, k: int, device: torch.device, dtype: torch.dtype, rotation: int | None, backend: str
) -> bool:
    """Whether the backend that runs the linear as a whole makes a norm inside it."""
    more = {"dtype": dtype, "rotation": rotation or 0}
    chosen = dispatch.choose("int8_linear", (_TOKENS, n, k), device, backend, **more)
    return rotation == 256 and "normed_int8_linear" in chosen.ops


class Activation:
    """The input of one or more linears, ``[..., K]``, computed when one of them asks, and once.

    Has the attributes of a tensor that say what it is; no linear needs others until it multiplies.
    ``alike``: smoothing vectors that differ in memory hold the same values. ``kind`` is what
    ``autotune`` measures it as: how it is made, and how many linears share it.
    """

    requires_grad = False
    kind = ""

    def __init__(self, like: Tensor, alike: bool):
        self.shape, self.dtype, self.device, self.ndim = (
            like.shape,
            like.dtype,
            like.device,
            like.ndim,
        )
        self._alike = alike
        self._dense: Tensor | None = None
        self._rows: list[tuple[Tensor | None, int | None, tuple[Tensor, Tensor]]] = []

    def dense(self) -> Tensor:
        """The values, ``[..., K]``, as the unfused block rounds them."""
        if self._dense is None:
            self._dense = self._values()
        return self._dense

    def rows(
        self, smooth: Tensor | None, rotation: int | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """``quantize_rows(R(values / smooth))``: ``q int8 [M, K]``, ``scale fp32 [M]``."""
        for known, group, rows in self._rows:
            same = known is smooth or (self._alike and None not in (known, smooth))
            if same and group == rotation:
                return rows
        rows = self._quantized(smooth, rotation, backend)
        self._rows.append((smooth, rotation, rows))
        return rows

    def rows_pay(self, n: int, smooth: Tensor | None, rotation: int | None) -> bool:
        """Whether rows are faster than values for a linear of ``n`` features left to ``"auto"``.

        A look-up; with smoothing yes, which only rows know. Unmeasured: yes, but where nothing
        makes rows and comfy-kitchen the whole linear.
        """
        if smooth is not None or not self.kind:
            return True
        detail = fused_detail(self.kind, rotation)
        found = _where_rows_pay(n, self.shape[-1], self.device, self.dtype, detail)
        tokens = math.prod(self.shape[:-1])
        return next((faster for end, faster in found if tokens <= end), True)

    def within(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        rotation: int | None,
        backend: str,
    ) -> Tensor | None:
        """The int8 linear of the values, made inside it ``[..., N]``; None where nothing does."""
        return None

    def _values(self) -> Tensor:
        raise NotImplementedError

    def _quantized(
        self, smooth: Tensor | None, rotation: int | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Normed(Activation):
    """``RMSNorm(x) * weight * scale``: ``x [..., K]``, ``weight [K]``, ``scale`` broadcastable.

    ``users``: how many linears share it.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        eps: float,
        alike: bool = False,
        users: int = 1,
    ):
        super().__init__(x, alike)
        self.kind = NORMED if users == 1 else NORMED_SHARED
        self._parts = x, weight, scale, eps

    def within(self, weight, weight_scale, bias, rotation, backend):
        x, _, scale, _ = self._parts
        n, k = weight.shape
        if scale.numel() != k or not _makes_norms(n, k, x.device, x.dtype, rotation, backend):
            return None  # a modulation for each picture of a batch would take as many products
        q = (weight, weight_scale, bias, rotation, backend)
        return prequantized.normed_linear(*self._parts, *q)

    def _values(self) -> Tensor:
        x, weight, scale, eps = self._parts
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps) * scale

    def _quantized(self, smooth, rotation, backend):
        return prequantized.normed_rows(*self._parts, smooth, rotation, backend)


class Gated(Activation):
    """``silu(gate) * up``, both ``[..., K]``."""

    kind = GATED

    def __init__(self, gate: Tensor, up: Tensor):
        super().__init__(gate, False)
        self._parts = gate, up

    def _values(self) -> Tensor:
        gate, up = self._parts
        return F.silu(gate) * up

    def _quantized(self, smooth, rotation, backend):
        return prequantized.gated_rows(*self._parts, smooth, rotation, backend)


def dense(x: Tensor | Activation) -> Tensor:
    """The values of ``x``, whichever it is."""
    return x.dense() if isinstance(x, Activation) else x


Linear = Callable[[Tensor | Activation], Tensor]


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of.

    ``modulation``: ``[B, 1, adaln_dim] -> [B, 1, 4 K]``, in order scale and gate of the attention,
    scale and gate of the feed-forward. ``attention``: qkv, q and k norms, rotary embedding,
    attention and o. ``norm_weight``: the weight ``[K]`` of a norm by its name. ``alike``: the
    smoothing vectors of w1 and w3, where there are any, hold the same values.
    """

    modulation: Callable[[Tensor], Tensor]
    attention: Linear
    w1: Linear
    w2: Linear
    w3: Linear
    norm_weight: Callable[[str], Tensor]
    eps: float
    alike: bool = False


def block(x: Tensor, condition: Tensor, parts: BlockParts, backend: str = dispatch.AUTO) -> Tensor:
    """``h = x + tanh(g1) * N2(attention(N1(x) * (1 + s1)))``, then the same with the feed-forward.

    ``x [B, L, K]``, ``condition`` the input of the modulation -> ``[B, L, K]`` in the dtype of
    ``x``. The feed-forward is ``w2(silu(w1(y)) * w3(y))``; ``backend`` runs norms and residuals.
    In fp32 equal to the unfused block but for roundings to int8 that fall the other way; in 16 bits
    what lies between two linears is not rounded to 16 bits.
    """
    scale1, gate1, scale2, gate2 = parts.modulation(condition).chunk(4, dim=-1)

    def add(x: Tensor, gate: Tensor, y: Tensor, norm: str) -> Tensor:
        weight = parts.norm_weight(norm)
        return prequantized.gate_residual_rmsnorm(
            x, torch.tanh(gate), y.to(x.dtype), weight, parts.eps, backend
        )

    h = Normed(x, parts.norm_weight("attention_norm1"), 1.0 + scale1, parts.eps)
    x = add(x, gate1, parts.attention(h), "attention_norm2")
    h = Normed(x, parts.norm_weight("ffn_norm1"), 1.0 + scale2, parts.eps, parts.alike, users=2)
    return add(x, gate2, parts.w2(Gated(parts.w1(h), parts.w3(h))), "ffn_norm2")
