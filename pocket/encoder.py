"""The random, frozen Qwen3-VL text model and the 13 taps that the transformer reads."""

from pathlib import Path

import torch
from torch import Tensor

from .tokenizer import TEMPLATE, VOCABULARY

TAPS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
HIDDEN = 64
LAYERS = 36
FEATURES = len(TAPS) * HIDDEN
_SEED = 7


def build_text_model():
    """A Qwen3-VL text model with random weights, all exact in bf16.

    The embeddings' std of 0.5 keeps a token's identity visible behind 36 random layers.
    """
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    rope = {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    config = Qwen3VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=4096,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(_SEED)
    model = Qwen3VLTextModel(config).eval().requires_grad_(False)
    model.embed_tokens.weight.normal_(0, 0.5)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return model


class CaptionEncoder:
    """Captions in, tapped hidden states out, as diffusers' pipeline computes them."""

    def __init__(self, tokenizer_dir: Path, model=None):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, local_files_only=True, trust_remote_code=False
        )
        self.model = model or build_text_model()

    def token_ids(self, caption: str) -> list[int]:
        """The ids of the caption inside the chat template."""
        return self.tokenizer(TEMPLATE.format(caption), add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, list[int]]:
        """Features [B, L, 832], padded on the left with zeros, and the lengths."""
        from transformers.masking_utils import create_causal_mask

        rows = [self.token_ids(c) for c in captions]
        lengths = [len(r) for r in rows]
        size = (len(rows), max(lengths))
        ids, mask = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        positions = torch.zeros(size, dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, -len(row) :] = torch.tensor(row)
            mask[b, -len(row) :] = 1
            positions[b, -len(row) :] = torch.arange(len(row))
        hidden = self.model.embed_tokens(ids)
        causal = create_causal_mask(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = self.model.rotary_emb(hidden, positions.expand(3, *size))
        taps = []
        for i, layer in enumerate(self.model.layers):
            hidden = layer(
                hidden,
                attention_mask=causal,
                position_ids=positions,
                past_key_values=None,
                position_embeddings=rotary,
            )
            if i in TAPS:
                taps.append(hidden)
        features = torch.stack(taps, -1).reshape(*size, FEATURES)
        return features * mask[..., None], lengths
