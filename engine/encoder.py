"""The text encoder: Qwen3-VL's language model, read at 13 of its layers, without padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLTextConfig, Qwen3VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from ..checkpoint import open_encoder
from ..errors import CheckpointError, OpError
from .linear import LinearOptions, default_device, default_dtype, install_weights

_log = logging.getLogger(__name__)

TAPS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
MAX_TOKENS = 2048
# Qwen3-VL's chat template for one user turn. That of a tokenizer's folder is a program, which a
# stranger may have written, so it is not run.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class TextEncoder:
    """Prompts in, features [L, 13 * hidden] out: what Ideogram 4's transformer reads."""

    def __init__(self, model: Qwen3VLTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def token_ids(self, prompt: str) -> list[int]:
        """The prompt as one user turn of the chat template, with the generation prompt.

        OpError over 2048 tokens: the transformer was trained on no longer texts.
        """
        ids = self.tokenizer(TEMPLATE.format(prompt), add_special_tokens=False)["input_ids"]
        if len(ids) > MAX_TOKENS:
            raise OpError(
                "the prompt is too long",
                found=f"{len(ids)} tokens",
                needed=f"at most {MAX_TOKENS}",
                hint="Shorten the caption: fewer elements, or shorter descriptions.",
            )
        return ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Hidden states after decoder layers 0, 3, ..., 33, 35, a tensor a prompt.

        Feature h of all 13 taps lie together: [L, 13 * hidden], fp32, on the encoder's device. One
        prompt at a time, so causal attention needs no mask, and prompts do not affect each other.
        """
        return [self._encode(self.token_ids(prompt)) for prompt in prompts]

    def _encode(self, ids: list[int]) -> Tensor:
        model = self.model
        weight = model.embed_tokens.weight
        compute = model.layers[0].input_layernorm.weight.dtype
        hidden = model.embed_tokens(torch.tensor([ids], device=weight.device)).to(compute)
        positions = torch.arange(len(ids), device=weight.device)[None]
        rotary = model.rotary_emb(hidden, positions.expand(3, 1, -1))
        taps = []
        for i, layer in enumerate(model.layers):
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
            if i in TAPS:
                taps.append(hidden[0])
        return torch.stack(taps, dim=-1).flatten(1).float()


def _load_tokenizer(
    folder: str | PathLike[str] | None, file: str | PathLike[str]
) -> PreTrainedTokenizerBase:
    if folder is None:
        raise CheckpointError(
            "no tokenizer beside the text encoder",
            file=file,
            needed="a folder with tokenizer.json",
            hint="Name one (--tokenizer): the tokenizer folder of Qwen3-VL-8B.",
        )
    if not Path(folder).is_dir():
        raise CheckpointError("not a tokenizer folder", file=folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises of every kind for what it did not write
        raise CheckpointError(f"no tokenizer can be read: {error!r}", file=folder) from error


def load_encoder(
    path: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    options: LinearOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TextEncoder:
    """The encoder of a Hugging Face folder, a safetensors file or a GGUF file.

    ``tokenizer`` names a folder where the encoder brings none. Raises CheckpointError for a model
    with fewer layers than the taps need, and whatever `open_encoder` finds wrong.
    """
    device = default_device(device)
    dtype = default_dtype(device, dtype)
    ck = open_encoder(path)
    words = _load_tokenizer(tokenizer or ck.tokenizer_dir, path)
    config = Qwen3VLTextConfig(**ck.config)
    if config.num_hidden_layers <= TAPS[-1]:
        raise CheckpointError(
            "too few layers for Ideogram 4's taps",
            file=path,
            found=config.num_hidden_layers,
            needed=f"at least {TAPS[-1] + 1}",
        )
    config.num_hidden_layers = TAPS[-1] + 1
    with torch.device("meta"):
        model = Qwen3VLTextModel._from_config(config, attn_implementation="sdpa")
    if "norm.weight" not in ck.entries:
        model.norm = nn.Identity()  # writing needs it; the taps are read before it
    install_weights(
        model,
        ck.stream(dtype=dtype, progress=progress),
        file=path,
        device=device,
        dtype=dtype,
        options=options,
    )
    model.rotary_emb = Qwen3VLTextRotaryEmbedding(config).to(device)
    return TextEncoder(model, words)
