"""Attention of a loaded model, put in by the host's own override and nothing else.

``host`` installs nothing: the model runs what the host was started with, or what a node such as
*ModelAttentionBackend* sets after this one.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import get_attention_function
from torch import Tensor

from ..ops import attention
from ..ops.dispatch import AUTO
from .report import HOST_ATTENTION

CHOICES = (HOST_ATTENTION, AUTO, *attention.NAMES)


def check(requested: str, device: torch.device) -> None:
    """Raises OpError or BackendUnavailableError for what ``install`` cannot give."""
    if requested != HOST_ATTENTION:
        attention.check(requested, device)


def install(patcher: comfy.model_patcher.ModelPatcher, requested: str) -> None:
    """Makes ``requested``, one of CHOICES, the attention of a model."""
    if requested != HOST_ATTENTION:
        patcher.set_model_optimized_attention(override(requested))


def override(backend: str) -> Callable[..., Tensor]:
    """The host's signature of an attention function over ``ops.attention``.

    A mask, and a model that asks for full precision, go to the host's own torch attention.
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision=None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs,
    ) -> Tensor:
        plain = skip_reshape and kwargs.get("scale") is None and not kwargs.get("enable_gqa", False)
        exact = kwargs.get("low_precision_attention", True) is False
        if mask is not None:
            attention.log_masked()
        if mask is not None or exact or not plain:
            return get_attention_function("pytorch")(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        out = attention.attention(q, k, v, backend=backend)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return attend
