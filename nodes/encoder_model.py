"""The host's Qwen3-VL classes with raw taps for conditioning, and a `Writer` for what is written.

The host has one class for each purpose: that for files without a vision tower taps raw hidden
states and has no head, that with one writes and normalizes the last tap, which is another feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management as management
import comfy.sd1_clip
import comfy.text_encoders.ideogram4 as host_encoder
import comfy.text_encoders.qwen3vl as host_writer
import torch
from comfy.text_encoders.llama import Llama2_, Qwen3VL_8BConfig
from torch import Tensor

from ..errors import OpError
from .writer import Writer

Draw = Callable[[Tensor], Tensor]


class LanguageModel(host_writer.Qwen3VL):
    """The language model alone: no final norm in it, so every tap is raw."""

    writer: Writer | None = None
    _draw: Draw | None = None

    def __init__(self, config_dict: dict, dtype, device, operations) -> None:
        torch.nn.Module.__init__(self)  # the host's own builds a vision tower
        config = Qwen3VL_8BConfig(**config_dict, final_norm=False, lm_head=False)
        self.num_layers = config.num_hidden_layers
        self.model = Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype

    def preprocess_embed(self, embed: dict, device) -> tuple:
        # as no module of this one: it has a patcher of its own
        object.__setattr__(self, "visual", self.writer.vision)
        return super().preprocess_embed(embed, device)

    def logits(self, x: Tensor) -> Tensor:
        """[B, 1, vocabulary] of the last position."""
        return self.writer.head(x[:, -1:])

    @contextmanager
    def drawing(self, draw: Draw) -> Iterator[None]:
        """Within it tokens are drawn by ``draw(logits [1, V]) -> [1, 1]``."""
        self._draw = draw
        try:
            yield
        finally:
            self._draw = None

    def sample_token(self, logits: Tensor, *args, **kwargs) -> Tensor:
        # the host looks at its progress for this, which it does not update at every token
        management.throw_exception_if_processing_interrupted()
        if self._draw is None:
            return super().sample_token(logits, *args, **kwargs)
        return self._draw(logits)


class ClipModel(host_writer.Qwen3VLClipModel):
    """13 raw taps of `LanguageModel`, and text from it."""

    def __init__(self, device="cpu", dtype=None, attention_mask=True, model_options=None) -> None:
        comfy.sd1_clip.SDClipModel.__init__(
            self,
            device=device,
            layer=host_encoder.IDEOGRAM4_TAP_LAYERS,
            textmodel_json_config={},
            dtype=dtype,
            special_tokens={"pad": 151643},
            layer_norm_hidden_state=False,
            model_class=LanguageModel,
            enable_attention_masks=attention_mask,
            return_attention_masks=attention_mask,
            model_options=model_options or {},
        )

    def generate(self, tokens, do_sample, max_length, *args, **kwargs) -> list[int]:
        """Token ids of the answer; CheckpointError where the encoder has no part for it."""
        if isinstance(tokens, dict):
            tokens = next(iter(tokens.values()))
        picture = any(isinstance(token[0], dict) for chunk in tokens for token in chunk)
        length = sum(len(chunk) for chunk in tokens) + max_length
        self.transformer.writer.to_device(self.owner, length, picture=picture)
        return super().generate(tokens, do_sample, max_length, *args, **kwargs)


class TextEncoder(host_encoder.Ideogram4TEModel):
    """What the host's CLIP holds: `ClipModel` under the name that its options go by."""

    def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
        options = {**(model_options or {}), "qwen3vl_8b_class": ClipModel}
        super().__init__(device=device, dtype=dtype, model_options=options)

    def set_writer(self, writer: Writer, stops: list[int]) -> None:
        """``stops``: the tokens that end an answer."""
        language = self.qwen3vl_8b.transformer
        language.writer = writer
        language.model.config.stop_tokens = stops
        # no module of its own part, which would make the two a ring
        object.__setattr__(self.qwen3vl_8b, "owner", self)


def language_model(clip: object) -> LanguageModel:
    """The language model of a CLIP of this pack's loader; OpError for another's."""
    inner = getattr(getattr(clip, "cond_stage_model", None), "qwen3vl_8b", None)
    found = getattr(inner, "transformer", None)
    if not isinstance(found, LanguageModel):
        raise OpError(
            "captions are written by the encoder of this pack's loader",
            found=type(getattr(clip, "cond_stage_model", clip)).__name__,
            hint="Connect Load Qwen3-VL encoder (quantized), or switch expand off.",
        )
    return found
