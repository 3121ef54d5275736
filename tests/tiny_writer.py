"""A small Qwen3-VL with random weights that writes: language model, head, vision tower, as files.

Written without the package under test. It has the pocket model's tokenizer, so its text is
gibberish of whole words; what it says is of no interest, what becomes of it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ideogram4_quant.pocket.paths import encoder_dir

HIDDEN, WORDS, LAYERS = 64, 512, 36
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 64,
    "out_hidden_size": HIDDEN,
    "deepstack_visual_indexes": [1],
}


@dataclass(frozen=True)
class TinyWriter:
    """``whole`` has everything, ``headless`` lacks head and vision tower, ``head`` is a head alone;
    ``model`` is transformers' own with the same weights in fp32."""

    whole: Path
    headless: Path
    head: Path
    model: torch.nn.Module


def write_tiny_writer(root: Path, seed: int = 5, layers: int = LAYERS) -> TinyWriter:
    """Writes all files below ``root``."""
    model = _model(seed, layers)
    state = {name: p.bfloat16().contiguous() for name, p in model.state_dict().items()}
    own = {k: v for k, v in state.items() if k.startswith("model.language_model.")}
    whole = _folder(root / "whole", state, model.config)
    headless = _folder(root / "headless", own, model.config)
    head = root / "head" / "diffusion_pytorch_model.safetensors"
    head.parent.mkdir()
    save_file({"lm_head.weight": state["lm_head.weight"]}, head, {"format": "pt"})
    return TinyWriter(whole, headless, head, model)


def _folder(folder: Path, state: dict, config) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder_dir() / name, folder / name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@torch.no_grad()
def _model(seed: int, layers: int) -> torch.nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLTextConfig

    words = json.loads((encoder_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in words["added_tokens"]}
    rope = {"rope_type": "default", "rope_theta": 5e6}
    rope |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = Qwen3VLTextConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    places = {
        f"{name}_token_id": ids[f"<|{token}|>"]
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text.to_dict(), vision_config=VISION, **places)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            parameter.normal_(0, 0.5)
        elif name == "lm_head.weight":
            parameter.normal_(0, 0.3)
        elif name.endswith("norm.weight") and "language_model" in name:
            parameter.copy_(1 + 0.4 * torch.randn_like(parameter))  # a norm that shows
        parameter.copy_(parameter.bfloat16())
    return model.eval().requires_grad_(False)
