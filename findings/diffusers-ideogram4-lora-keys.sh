#!/usr/bin/env bash
# Question:  which files does diffusers' LoRA loader for Ideogram 4 load, and what of the others?
# Good guess: a file in a form that it knows is loaded whole, any other is refused.
# Behaviour: there is a third way: it loads *nothing* and says so in a log line alone ("safe to
#            ignore"). And what form a file has is told by one kind of layer: keys under
#            `conditional_transformer.` and bare ones are known if the file has an `attention.qkv`; a
#            LoRA of the MLP alone, by the same trainer with the same prefix, loads nothing.
# Versions:  diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Seen:      2026-11-30, x86-64 Linux, Python 3.11, layers that got a LoRA:
#            diffusion_model., fused 5           diffusion_model., MLP alone 1
#            conditional_transformer., fused 5   conditional_transformer., MLP alone: nothing
#            bare, fused 5                       bare, MLP alone: nothing
#            transformer., split 5               bare, split: nothing
#            lora_unet_ (kohya): nothing         unconditional_transformer., split: nothing
#            diffusion_model., split: ValueError transformer., fused: ValueError
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
venv/bin/python 2>log - <<'PY' || { cat log; exit 1; }
import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

H = 256
MLP = {"layers.0.feed_forward.w2": (H, H)}
FUSED = {"layers.0.attention.qkv": (3 * H, H), "layers.0.attention.o": (H, H)} | MLP
SPLIT = {f"layers.0.attention.{name}": (H, H) for name in ("to_q", "to_k", "to_v", "to_out.0")} | MLP


def pair(base, shape, names):
    rows, columns = shape
    down, up = names
    return {f"{base}.{down}.weight": torch.ones(4, columns), f"{base}.{up}.weight": torch.ones(rows, 4)}


def peft(prefix, layers):
    return {k: v for n, s in layers.items() for k, v in pair(prefix + n, s, ("lora_A", "lora_B")).items()}


def kohya(prefix, layers):
    names = {n: prefix + n.replace(".", "_") for n in layers}
    files = (pair(names[n], s, ("lora_down", "lora_up")) for n, s in layers.items())
    alphas = {f"{names[n]}.alpha": torch.tensor(4.0) for n in layers}
    return {k: v for file in files for k, v in file.items()} | alphas


def loaded(lora):
    model = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=128, num_attention_heads=2,
        intermediate_size=H, adaln_dim=32, llm_features_dim=64, mrope_section=(24, 20, 20),
    )
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipe = Ideogram4Pipeline(**parts, transformer=model, unconditional_transformer=None)
    try:
        pipe.load_lora_weights(lora)
    except ValueError:
        return "ValueError"
    return sum("lora_B" in name for name, _ in model.named_parameters()) or "nothing"


FORMS = {
    "diffusion_model., fused": (peft("diffusion_model.", FUSED), 5),
    "diffusion_model., MLP alone": (peft("diffusion_model.", MLP), 1),
    "conditional_transformer., fused": (peft("conditional_transformer.", FUSED), 5),
    "conditional_transformer., MLP alone": (peft("conditional_transformer.", MLP), "nothing"),
    "bare, fused": (peft("", FUSED), 5),
    "bare, MLP alone": (peft("", MLP), "nothing"),
    "transformer., split": (peft("transformer.", SPLIT), 5),
    "bare, split": (peft("", SPLIT), "nothing"),
    "lora_unet_ (kohya)": (kohya("lora_unet_", FUSED), "nothing"),
    "unconditional_transformer., split": (peft("unconditional_transformer.", SPLIT), "nothing"),
    "diffusion_model., split": (peft("diffusion_model.", SPLIT), "ValueError"),
    "transformer., fused": (peft("transformer.", FUSED), "ValueError"),
}
found = {name: loaded(lora) for name, (lora, _) in FORMS.items()}
for name, what in found.items():
    print(f"{name}: {what}")
assert found == {name: want for name, (_, want) in FORMS.items()}, found
PY
