"""A caption from a sentence by diffusers' own method, on the encoder that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

import torch
from diffusers import Ideogram4Pipeline, Ideogram4PromptEnhancerHead
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from ..captions.tokens import MAX_TOKENS
from ..checkpoint import open_encoder
from ..checkpoint.encoder_writing import HEAD, Part, find_head, open_head
from ..errors import CheckpointError
from .encoder import TextEncoder
from .pipeline import TURNS

_WITH_HEAD = (
    "Name the file of diffusers/qwen3-vl-8b-instruct-lm-head (--head), or take an encoder with a "
    "head, such as Comfy-Org's qwen3vl_8b_fp8_scaled.safetensors."
)


def read_head(encoder: str | PathLike[str], head: str | PathLike[str] | None = None) -> Part:
    """The head in ``head``, else in the encoder's own file; CheckpointError where there is none."""
    checkpoint = open_encoder(encoder)
    if "norm.weight" not in checkpoint.entries:
        raise CheckpointError(
            "this encoder cannot write: its file lacks the final norm", file=encoder
        )
    found = open_head(head, checkpoint) if head is not None else find_head(checkpoint)
    if found is None:
        raise CheckpointError(
            "this encoder cannot write: it has no head",
            file=encoder,
            found=f"no {HEAD}",
            hint=_WITH_HEAD,
        )
    return found


def writer(
    encoder: TextEncoder, head: Part, seed: int, max_tokens: int = MAX_TOKENS
) -> Callable[[str, tuple[int, int]], str]:
    """(sentence, ratio) -> what `Ideogram4Pipeline.upsample_prompt` returns, seeded.

    ``encoder`` must have been loaded with its final norm.
    """
    module = Ideogram4PromptEnhancerHead(*reversed(head.entries[HEAD].shape))
    device = encoder.model.embed_tokens.weight.device
    dtype = encoder.model.norm.weight.dtype
    weight = head.load(dtype)[HEAD]
    weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
    module.lm_head.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    encoder.tokenizer.chat_template = TURNS
    pipeline = Ideogram4Pipeline(
        None, None, _body(encoder), encoder.tokenizer, None, None, prompt_enhancer_head=module
    )

    def write(sentence: str, ratio: tuple[int, int]) -> str:
        width, height = ratio
        return pipeline.upsample_prompt(
            sentence,
            height=height,
            width=width,
            max_new_tokens=max_tokens,
            generator=torch.Generator().manual_seed(seed),
            device=device,
        )[0]

    return write


def _body(encoder: TextEncoder) -> Qwen3VLModel:
    """The loaded language model inside a Qwen3-VL without its vision tower."""
    text = encoder.model.config.to_dict()
    text["eos_token_id"] = encoder.tokenizer.eos_token_id
    text["pad_token_id"] = encoder.tokenizer.pad_token_id
    with torch.device("meta"):
        body = Qwen3VLModel(Qwen3VLConfig(text_config=text))
    body.visual = nn.Module()
    body.language_model = encoder.model
    return body
