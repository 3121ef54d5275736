"""A transformer block of Ideogram 4 on synthetic weights, run fused and as torch runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import attention, dispatch, fused
from .common import Sizes, random
from .weights import Linear, linear

EPS = 1e-5
_ROPE = "rms_rope"
_ADALN = 512

Turn = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
Inputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


class Block:
    """One transformer block with random weights of a level; ``fused_`` picks how it runs."""

    def __init__(self, level: str, size: Sizes, device: torch.device, dtype: torch.dtype):
        h, f = size.hidden, size.feed_forward
        self.heads = size.heads
        self.attends = attention.AUTO
        self.turns: Turn = turn_eagerly
        make = partial(linear, level, device=device, dtype=dtype)
        self.qkv, self.o = make(n=3 * h, k=h), make(n=h, k=h)
        self.w1, self.w3, self.w2 = make(n=f, k=h), make(n=f, k=h), make(n=h, k=f)
        self.modulation: Linear = linear("BF16", 4 * h, _ADALN, device, dtype)
        self.norm = torch.ones(h, device=device, dtype=dtype)
        self.head_norm = torch.ones(256, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Of its linears."""
        parts = (self.qkv, self.o, self.w1, self.w2, self.w3, self.modulation)
        return sum(part.nbytes for part in parts)

    def attention(self, x: Tensor | fused.Activation, rope: tuple[Tensor, Tensor]) -> Tensor:
        """qkv, norms of q and k, rotary embedding, attention, o."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, 256)
        q, k, v = qkv.unbind(dim=2)
        q, k = self.turns(q, k, self.head_norm, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        backend = attention.choose(self.heads, 256, tokens, v.device, v.dtype, self.attends)
        out = attention.attention(q, k, v, backend=backend)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, -1))

    def plain(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """As the reference's block is written."""
        scale1, gate1, scale2, gate2 = self.modulation(condition).chunk(4, dim=-1)
        norm = partial(F.rms_norm, normalized_shape=x.shape[-1:], weight=self.norm, eps=EPS)
        h = self.attention(norm(x) * (1 + scale1), rope)
        x = x + torch.tanh(gate1) * norm(h)
        h = norm(x) * (1 + scale2)
        h = self.w2(F.silu(self.w1(h)) * self.w3(h))
        return x + torch.tanh(gate2) * norm(h)

    def fused(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """On the pack's kernels."""
        parts = fused.BlockParts(
            modulation=self.modulation,
            attention=partial(self.attention, rope=rope),
            w1=self.w1,
            w2=self.w2,
            w3=self.w3,
            norm_weight=lambda name: self.norm,
            eps=EPS,
        )
        return fused.block(x, condition, parts)


def turn_eagerly(
    q: Tensor, k: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head, then its halves ``(a, b) -> (a cos - b sin, b cos + a sin)``, by torch.

    ``q`` and ``k`` ``[B, L, H, 256]``, ``rope`` cos and sin ``[1, L, 128]`` fp32.
    """
    cos, sin = (t.repeat(1, 1, 2).unsqueeze(2) for t in rope)
    turned = []
    for x in (q, k):
        wide = F.rms_norm(x, (256,), weight, EPS).float()
        one, two = wide.chunk(2, dim=-1)
        turned.append((wide * cos + torch.cat((-two, one), dim=-1) * sin).to(x.dtype))
    return turned[0], turned[1]


def _turn_by_kernel(
    q: Tensor, k: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same in one pass."""
    return _turning(q.device).get(_ROPE)(q, k, weight, weight, *rope, EPS)


def _turning(device: torch.device) -> dispatch.Backend:
    return dispatch.choose(_ROPE, (256, 256, 256), device)


def turns(device: torch.device) -> dict[str, Turn]:
    """How norm and rotary embedding of q and k can run: ``heads`` of the rows."""
    there = _ROPE in dispatch.REFERENCE_OPS and _ROPE in _turning(device).ops
    kernel = there and _turning(device).name != dispatch.REFERENCE.name
    return ({"fused": _turn_by_kernel} if kernel else {}) | {"eager": turn_eagerly}


def inputs_of(tokens: int, size: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
    """What a block is called with: ``x [1, L, hidden]``, its condition, cos and sin."""
    x = random((1, tokens, size.hidden), device, dtype)
    condition = random((1, 1, _ADALN), device, dtype, 1)
    angle = random((1, tokens, 128), device, torch.float32, 2)
    return x, condition, (angle.cos(), angle.sin())
