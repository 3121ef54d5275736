"""The forms of LoRA keys in use, and what each program makes of a file in that form.

Every file updates the linears of one block; ``ours``, ``stock`` (ComfyUI 0.33's Load LoRA) and
``diffusers`` (0.42.1) are how many of the pack's fused linears an update reaches, or ``refused``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

H, FFN = 256, 768
MLP = {"layers.0.feed_forward.w2": (H, FFN)}
FUSED = {"layers.0.attention.qkv": (3 * H, H), "layers.0.attention.o": (H, H)} | MLP
SPLIT = {
    f"layers.0.attention.{name}": (H, H) for name in ("to_q", "to_k", "to_v", "to_out.0")
} | MLP
STEM = {"input_proj": (H, 128)}
#: The linears of the model, as `parse_lora` wants them.
SHAPES = FUSED | STEM


def peft(prefix: str, linears: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """``lora_A`` and ``lora_B`` of rank 4."""
    state = {}
    for name, (n, k) in linears.items():
        state[f"{prefix}{name}.lora_A.weight"] = torch.ones(4, k)
        state[f"{prefix}{name}.lora_B.weight"] = torch.ones(n, 4)
    return state


def kohya(prefix: str, linears: Mapping[str, tuple[int, int]], dot: str = ".") -> dict[str, Tensor]:
    """``lora_down``, ``lora_up`` and ``alpha`` of rank 4; ``dot`` between the parts of a name."""
    state = {}
    for name, (n, k) in linears.items():
        base = prefix + name.replace(".", dot)
        state[f"{base}.lora_down.weight"] = torch.ones(4, k)
        state[f"{base}.lora_up.weight"] = torch.ones(n, 4)
        state[f"{base}.alpha"] = torch.tensor(4.0)
    return state


@dataclass(frozen=True)
class Form:
    """A file's keys, and the linears that each program updates by them."""

    state: Mapping[str, Tensor]
    ours: int | str
    stock: int | str
    diffusers: int | str


REFUSED = "refused"
FORMS = {
    "diffusion_model., fused": Form(peft("diffusion_model.", FUSED), 3, 3, 3),
    "diffusion_model., fused, kohya": Form(kohya("diffusion_model.", FUSED), 3, 3, 3),
    "diffusion_model., fused, with input_proj": Form(
        peft("diffusion_model.", FUSED | STEM), 4, 4, REFUSED
    ),
    "diffusion_model., MLP alone": Form(peft("diffusion_model.", MLP), 1, 1, 1),
    "diffusion_model., split": Form(peft("diffusion_model.", SPLIT), 3, 1, REFUSED),
    "model.diffusion_model., fused": Form(peft("model.diffusion_model.", FUSED), 3, 0, REFUSED),
    "conditional_transformer., fused": Form(peft("conditional_transformer.", FUSED), 3, 0, 3),
    "conditional_transformer., MLP alone": Form(peft("conditional_transformer.", MLP), 1, 0, 0),
    "unconditional_transformer., split": Form(peft("unconditional_transformer.", SPLIT), 3, 0, 0),
    "transformer., split": Form(peft("transformer.", SPLIT), 3, 0, 3),
    "transformer., split, with input_proj": Form(peft("transformer.", SPLIT | STEM), 4, 0, 4),
    "transformer., split, kohya": Form(kohya("transformer.", SPLIT), 3, 0, REFUSED),
    "transformer., fused": Form(peft("transformer.", FUSED), 3, 0, REFUSED),
    "bare, fused": Form(peft("", FUSED), 3, 0, 3),
    "bare, MLP alone": Form(peft("", MLP), 1, 0, 0),
    "bare, split": Form(peft("", SPLIT), 3, 0, 0),
    "base_model.model., split": Form(peft("base_model.model.", SPLIT), 3, 0, 0),
    "lora_unet_, fused": Form(kohya("lora_unet_", FUSED, "_"), 3, 3, 0),
    "lora_transformer_, split": Form(kohya("lora_transformer_", SPLIT, "_"), 3, 0, 0),
}
