"""Ideogram 4's transformer: diffusers' modules, the file's weights, and a pass without a mask.

diffusers' own forward pads the text to a fixed length and builds an L x L mask at every pass, which
keeps torch from its flash kernel. Here a pass holds one length only, so nothing is padded and
nothing is masked; what does not change from step to step is computed once a picture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    Ideogram4Attention,
    Ideogram4MRoPE,
)
from torch import Tensor, nn

from ..errors import OpError
from ..ops.attention import SDPA, attention
from ..ops.attention import check as check_attention
from ..ops.dispatch import AUTO
from ..ops.prequantized import rms_rope
from ..ops.tuning.autotune import Measure, layers_of, tune
from .linear import LinearOptions, QuantLinear, default_device, default_dtype, install_weights

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

_log = logging.getLogger(__name__)

# Parts of a parameter's name here -> parts of its canonical name.
_CANONICAL = {".attention.to_qkv.": ".attention.qkv.", ".attention.to_out.0.": ".attention.o."}
_TEXT_MODULES = ("llm_cond_norm", "llm_cond_proj")


def canonical_name(name: str) -> str:
    """The checkpoint's name of a parameter of the engine's model."""
    for here, canonical in _CANONICAL.items():
        name = name.replace(here, canonical)
    return name


class FusedAttnProcessor:
    """softmax(q k^T / sqrt(D)) v with q, k, v from one linear; an optional mask is honoured.

    backend: see `ops.attention`.
    """

    def __init__(self, backend: str = SDPA) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Ideogram4Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        qkv = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        query, key, value = qkv.unbind(dim=2)  # [B, L, heads, D]
        # diffusers' table has each angle twice, for the low half of a head and for the high one
        cos, sin = (table[..., : attn.head_dim // 2] for table in image_rotary_emb)
        query, key = _turned(attn, query, key, cos, sin)
        mixed = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            backend=self.backend,
        )
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _turned(
    attn: Ideogram4Attention, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Norm and rotary embedding of q and k, in one pass where their weights are here.

    accelerate's sequential offload brings the weights of a module when that module is called.
    """
    norms, eps = (attn.norm_q.weight, attn.norm_k.weight), attn.norm_q.eps
    if norms[0].device == query.device:
        return rms_rope(query, key, *norms, cos, sin, eps, AUTO)
    table = tuple(torch.cat((half, half), dim=-1).unsqueeze(2) for half in (cos, sin))
    return _rotate(attn.norm_q(query), *table), _rotate(attn.norm_k(key), *table)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin in fp32; x [B, L, heads, D], cos and sin [1, L, 1, D]."""
    wide = x.float()
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


class PackTransformer(Ideogram4Transformer2DModel):
    """diffusers' model whose ``dtype`` is the compute dtype, whatever the linears' storage.

    diffusers' pipeline casts latents and text features to ``dtype``, and would take that of the
    first weight: bf16 where an fp32 model keeps bf16 weights.
    """

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self)

    def check_dtype(self, *args: object, **kwargs: object) -> None:
        """OpError where arguments of ``to`` name another dtype: codes cannot follow, and the rotary
        table must stay fp32."""
        given = [*args, *kwargs.values()]
        for wanted in (each for each in given if isinstance(each, torch.dtype)):
            if wanted != self.dtype:
                raise OpError(
                    "a loaded model keeps its compute dtype",
                    found=wanted,
                    needed=self.dtype,
                    hint="Load it again with dtype=...",
                )

    def to(self, *args: object, **kwargs: object) -> PackTransformer:
        """Moves the model; OpError for another dtype."""
        self.check_dtype(*args, **kwargs)
        return super().to(*args, **kwargs)


def _skeleton(config: dict, with_text: bool, backend: str) -> PackTransformer:
    """diffusers' model on the meta device, with fused qkv and a real rotary table."""
    with torch.device("meta"):
        model = PackTransformer(**config)
        for block in model.layers:
            attn = block.attention
            del attn.to_q, attn.to_k, attn.to_v
            attn.to_qkv = nn.Linear(attn.hidden_size, 3 * attn.hidden_size, bias=False)
            attn.set_processor(FusedAttnProcessor(backend))
    if not with_text:
        for name in _TEXT_MODULES:
            setattr(model, name, None)
    return model


def load_transformer(
    ck: Checkpoint,
    copy: str = "conditional",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: LinearOptions | None = None,
    attention: str = SDPA,
    measure: Measure | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackTransformer:
    """One copy of a checkpoint as diffusers' model, its linears through `ops.linear`.

    ``dtype`` is the compute dtype: fp32 on a CPU, bf16 elsewhere by default; fp16 overflows in this
    model and is refused. ``attention``: of `ops.attention`. ``measure``: time the backends on the
    shapes of the model before the first step; without it ``"auto"`` is the documented order, which
    is what repeatable figures want. The unconditional copy never reads text, so its text projection
    (490 MB in bf16) is left out. Raises what ``ck.stream`` raises: a copy that is not there, or
    tensors that are missing.
    """
    device = default_device(device)
    dtype = default_dtype(device, dtype)
    if dtype not in (torch.bfloat16, torch.float32):
        raise OpError(
            "Ideogram 4 overflows in this dtype",
            found=dtype,
            needed="bfloat16 or float32",
            hint="feed_forward.w2 of layers 0 and 1 gives values beyond float16's 65,504; leave "
            "the dtype out.",
        )
    check_attention(attention, device)
    conditional = copy == "conditional"
    config = ck.config.to_dict()
    model = _skeleton(config, conditional, attention)
    tensors = ck.stream(copy, dtype=dtype, progress=progress)
    install_weights(
        model,
        (part for part in tensors if conditional or not part[0].startswith(_TEXT_MODULES)),
        file=ck.paths[0],
        device=device,
        dtype=dtype,
        options=options,
        file_name_of=canonical_name,
    )
    # Positions reach 65536 + 127: the table stays fp32 in every compute dtype.
    head_dim, sections = config["attention_head_dim"], config["mrope_section"]
    model.rotary_emb = Ideogram4MRoPE(head_dim, config["rope_theta"], sections).to(device)
    if measure is not None:
        layers = layers_of(m.weight.data for m in model.modules() if isinstance(m, QuantLinear))
        heads = (config["num_attention_heads"], head_dim) if attention == AUTO else None
        tune(layers, device, dtype, measure, options=options, heads=heads)
    return model


def compute_dtype(model: Ideogram4Transformer2DModel) -> torch.dtype:
    """The dtype that activations have, whatever the linears' storage."""
    return model.embed_image_indicator.weight.dtype


def positions(text: int, rows: int, columns: int) -> Tensor:
    """(t, h, w) of [text][image] tokens, int64 [1, text + rows * columns, 3]."""
    words = torch.arange(text)[:, None].expand(text, 3)
    h, w = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack([torch.zeros_like(h), h, w], dim=-1).reshape(-1, 3)
    return torch.cat([words, image + IMAGE_POSITION_OFFSET])[None]


@dataclass(frozen=True)
class Prepared:
    """What a copy needs at every step of a picture and what no step changes."""

    text: Tensor | None  # embedded text tokens [B, T, hidden]; None: image tokens only
    cos: Tensor  # [1, T + N, head_dim], fp32
    sin: Tensor


@torch.no_grad()
def prepare(
    model: Ideogram4Transformer2DModel, rows: int, columns: int, features: Tensor | None = None
) -> Prepared:
    """Embeds text features [B, T, llm_features_dim], all of one length; None: no text."""
    weight = model.embed_image_indicator.weight
    text = None
    if features is not None:
        if model.llm_cond_proj is None:
            raise OpError("the unconditional copy takes no text", found=list(features.shape))
        normed = model.llm_cond_norm(features.to(weight))
        text = model.llm_cond_proj(normed) + weight[0]
    length = 0 if text is None else text.shape[1]
    cos, sin = model.rotary_emb(positions(length, rows, columns).to(weight.device))
    return Prepared(text, cos, sin)


@torch.no_grad()
def velocity(
    model: Ideogram4Transformer2DModel, latents: Tensor, time: float, prepared: Prepared
) -> Tensor:
    """v(x, t), fp32 [B, N, C] in the order of ``latents`` [B, N, C]; time 0 noise, 1 clean.

    Equal to diffusers' forward at the image tokens. The time embedding is computed in fp32: bf16
    holds only 8 bits of t.
    """
    return recorded_velocity(model, latents, time, prepared)


def recorded_velocity(
    model: Ideogram4Transformer2DModel,
    latents: Tensor,
    time: float,
    prepared: Prepared,
    run_block: Callable[..., Tensor] = lambda block, *inputs: block(*inputs),
) -> Tensor:
    """:func:`velocity`, recorded for gradients where they are on; ``run_block(block, *inputs)``
    may record a block by its inputs alone."""
    weight = model.embed_image_indicator.weight
    moment = torch.full((1,), time, dtype=torch.float32, device=weight.device)
    embedded = model.t_embedding(moment)[:, None]
    condition = F.silu(model.adaln_proj(embedded)).to(weight.dtype)  # [1, 1, adaln_dim]

    hidden = model.input_proj(latents.to(weight)) + weight[1]
    length = 0
    if prepared.text is not None:
        length = prepared.text.shape[1]
        hidden = torch.cat([prepared.text.expand(len(hidden), -1, -1), hidden], dim=1)
    for block in model.layers:
        hidden = run_block(block, hidden, None, (prepared.cos, prepared.sin), condition)
    return model.final_layer(hidden[:, length:], conditioning=condition).float()
