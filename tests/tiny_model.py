"""A small random Ideogram 4 in the formats of the wild, written without the package under test.

Dimensions of the pocket model: everything that a test needs runs in seconds on one core.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "in_channels": 128,
    "num_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "intermediate_size": 768,
    "adaln_dim": 256,
    "llm_features_dim": 832,
    "rope_theta": 10000,
    "mrope_section": (24, 20, 20),
    "norm_eps": 1e-5,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class TinyModel:
    """Where the parts lie, and diffusers' own models with the same (bf16-exact) weights in fp32."""

    conditional_file: Path
    unconditional_file: Path
    encoder_dir: Path
    vae_dir: Path
    vae_file: Path
    conditional: torch.nn.Module
    unconditional: torch.nn.Module
    text_model: torch.nn.Module
    vae: torch.nn.Module

    def pipeline(self):
        """diffusers' Ideogram4Pipeline, unmodified, on these weights."""
        from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline
        from transformers import AutoTokenizer

        pipeline = Ideogram4Pipeline(
            FlowMatchEulerDiscreteScheduler(),
            self.vae,
            AsVisionLanguageModel(self.text_model),
            AutoTokenizer.from_pretrained(self.encoder_dir),
            self.conditional,
            self.unconditional,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


class AsVisionLanguageModel(torch.nn.Module):
    """What the pipeline asks of its text encoder: the language model under that name."""

    def __init__(self, language_model: torch.nn.Module) -> None:
        super().__init__()
        self.language_model = language_model
        self.device, self.dtype = torch.device("cpu"), torch.float32


@torch.no_grad()
def _bf16_exact(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model.eval().requires_grad_(False)


def _bf16_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.bfloat16().contiguous() for name, p in model.state_dict().items()}


@torch.no_grad()
def random_transformer(seed: int, config: dict = CONFIG) -> torch.nn.Module:
    """diffusers' model with random weights under which every part takes part."""
    from diffusers import Ideogram4Transformer2DModel

    torch.manual_seed(seed)
    model = Ideogram4Transformer2DModel(**config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        elif "bias" in name:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    model.embed_image_indicator.weight.mul_(0.5)
    return _bf16_exact(model)


def canonical_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The fused, canonical names of ComfyUI and the original release."""
    state = _bf16_state(model)
    for i in range(len(model.layers)):
        path = f"layers.{i}.attention."
        parts = [state.pop(f"{path}to_{x}.weight") for x in "qkv"]
        state[f"{path}qkv.weight"] = torch.cat(parts)
        state[f"{path}o.weight"] = state.pop(f"{path}to_out.0.weight")
    return state


def diffusers_state(canonical: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `canonical_state`'s naming, in fp32."""
    state = {}
    for name, tensor in canonical.items():
        if name.endswith(".attention.qkv.weight"):
            for letter, part in zip("qkv", tensor.float().chunk(3), strict=True):
                state[name.replace(".qkv.", f".to_{letter}.")] = part
        else:
            state[name.replace(".attention.o.", ".attention.to_out.0.")] = tensor.float()
    return state


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(letters) + len(SPECIAL)


@torch.no_grad()
def _write_encoder(folder: Path, seed: int) -> torch.nn.Module:
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    rope = {"rope_type": "default", "rope_theta": 5e6}
    rope |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = Qwen3VLTextConfig(
        vocab_size=_write_tokenizer(folder),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=36,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=4096,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(seed)
    model = Qwen3VLTextModel(config)
    model.embed_tokens.weight.normal_(0, 0.5)
    _bf16_exact(model)
    state = {f"language_model.{name}": tensor for name, tensor in _bf16_state(model).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    whole = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLModel"]}
    whole["text_config"] = config.to_dict()
    (folder / "config.json").write_text(json.dumps(whole))
    return model


FLUX2_NAMES = [
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
    (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
    (".mid_block.attentions.0.to_", ".mid.attn_1."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".resnets.", ".block."),
    ("encoder.down_blocks.", "encoder.down."),
    *((f"decoder.up_blocks.{i}.", f"decoder.up.{3 - i}.") for i in range(4)),
]


def flux2_state(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The VAE as ComfyUI's single file names it, `bn` in the order (c, pi, pj)."""
    state = {}
    for name, tensor in vae.state_dict().items():
        for diffusers_part, flux2_part in FLUX2_NAMES:
            name = name.replace(diffusers_part, flux2_part)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        if name in ("bn.running_mean", "bn.running_var"):
            tensor = tensor.reshape(4, -1).t().flatten()
        state[name] = tensor.contiguous()
    return state


@torch.no_grad()
def random_vae(seed: int) -> torch.nn.Module:
    """A narrow FLUX.2 VAE; `bn` in the order (pi, pj, c), alike over a channel's positions."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(block_out_channels=(32, 64, 64, 64), layers_per_block=1)
    _bf16_exact(vae)
    channels = torch.randn(2, 1, 32)
    vae.bn.running_mean.copy_((channels[0] + 0.05 * torch.randn(4, 32)).flatten())
    vae.bn.running_var.copy_((channels[1] + 0.05 * torch.randn(4, 32)).exp().flatten())
    return vae


def write_tiny_model(root: Path, seed: int = 0) -> TinyModel:
    """Writes all files below ``root``."""
    conditional, unconditional = random_transformer(seed), random_transformer(seed + 1)
    files = []
    for model, kind in ((conditional, "ideogram4_cond"), (unconditional, "ideogram4_uncond")):
        path = root / f"tiny_{kind}.safetensors"
        metadata = {"model_type": kind, "config": json.dumps(CONFIG), "format": "pt"}
        save_file(canonical_state(model), path, metadata)
        files.append(path)
    encoder_dir, vae_dir = root / "encoder", root / "vae"
    encoder_dir.mkdir(parents=True)
    text_model = _write_encoder(encoder_dir, seed + 2)
    vae = random_vae(seed + 3)
    vae.save_pretrained(vae_dir)
    save_file(flux2_state(vae), root / "flux2-vae.safetensors")
    return TinyModel(
        *files,
        encoder_dir,
        vae_dir,
        root / "flux2-vae.safetensors",
        conditional,
        unconditional,
        text_model,
        vae,
    )


def packed_inputs(
    x: torch.Tensor, features: torch.Tensor | None, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    """Arguments of diffusers' forward for [text][image] tokens without padding."""
    from diffusers import Ideogram4Pipeline

    b, n, channels = x.shape
    text = 0 if features is None else features.shape[1]
    width = CONFIG["llm_features_dim"] if features is None else features.shape[2]
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids(
        [text] * b, rows, columns, text, torch.device("cpu")
    )
    words = x.new_zeros(b, text, width) if features is None else features.to(x)
    return {
        "hidden_states": torch.cat([x.new_zeros(b, text, channels), x], dim=1),
        "encoder_hidden_states": torch.cat([words, x.new_zeros(b, n, width)], dim=1),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }
