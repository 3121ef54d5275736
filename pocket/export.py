"""From checkpoints to the files of the wild, and back: `--stage export`.

Transformers: one bf16 file a copy, canonical (fused) names, `model_type` and `config` in the
metadata. Encoder and VAE: folders as Hugging Face ships them.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.branches import GUIDANCE_KEY, GUIDANCE_NONE
from .encoder import CaptionEncoder, build_text_model
from .paths import Copy, dit_path, encoder_dir, vae_dir
from .train_vae import build_vae
from .transformer import CONFIG, build_transformer

StateDict = dict[str, Tensor]
STRENGTH = 1.5


def to_canonical(state: StateDict) -> StateDict:
    """diffusers' names -> canonical ones: to_q, to_k, to_v stacked to qkv, to_out.0 is o."""
    out = {}
    for name, tensor in state.items():
        if ".attention.to_q." in name:
            rows = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(rows)
        elif ".attention.to_out.0." in name:
            out[name.replace("to_out.0", "o")] = tensor
        elif ".attention.to_" not in name:
            out[name] = tensor
    return out


def from_canonical(state: StateDict) -> StateDict:
    """The inverse of `to_canonical`."""
    out = {}
    for name, tensor in state.items():
        if ".attention.qkv." in name:
            for part, rows in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                out[name.replace("qkv", part)] = rows.contiguous()
        elif ".attention.o." in name:
            out[name.replace("attention.o.", "attention.to_out.0.")] = tensor
        else:
            out[name] = tensor
    return out


def _write(state: StateDict, path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, part, metadata)
    part.chmod(0o644)
    os.replace(part, path)


def export_transformer(state: StateDict, copy: Copy, root: Path) -> None:
    """Writes one copy, or the one branch (diffusers' names, fp32), as bf16."""
    mark = {GUIDANCE_KEY: GUIDANCE_NONE} if copy == "one_branch" else {}
    kind = "cond" if copy == "one_branch" else copy
    rounded = {k: v.bfloat16() for k, v in to_canonical(state).items()}
    metadata = {
        "format": "pt",
        "model_type": f"ideogram4_{kind}",
        **mark,
        "config": json.dumps({"_class_name": "Ideogram4Transformer2DModel", **CONFIG}),
    }
    _write(rounded, dit_path(copy, root), metadata)


def transformer_config(path: Path) -> dict:
    """The diffusers config in a transformer file's metadata."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return {k: v for k, v in config.items() if not k.startswith("_")}


def load_transformer(copy: Copy, root: Path):
    """diffusers' model in fp32 from a committed file."""
    path = dit_path(copy, root)
    model = build_transformer(transformer_config(path)).eval().requires_grad_(False)
    model.load_state_dict({k: v.float() for k, v in from_canonical(load_file(path)).items()})
    return model


def export_encoder(tokenizer: Path, root: Path) -> None:
    """config.json, the tokenizer's files, model.safetensors (bf16, names under `model.`)."""
    folder = encoder_dir(root)
    folder.mkdir(parents=True, exist_ok=True)
    model = build_text_model()
    config = model.config.to_dict() | {"architectures": ["Qwen3VLTextModel"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in sorted(tokenizer.iterdir()):
        shutil.copyfile(file, folder / file.name)
    state = {f"model.{k}": v.bfloat16() for k, v in model.state_dict().items()}
    _write(state, folder / "model.safetensors", {"format": "pt"})


def load_encoder(root: Path) -> CaptionEncoder:
    """The committed encoder in fp32, with its tokenizer."""
    from transformers import Qwen3VLTextModel

    folder = encoder_dir(root)
    model = Qwen3VLTextModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return CaptionEncoder(folder, model.eval().requires_grad_(False))


def export_vae(state: StateDict, root: Path) -> None:
    """config.json and the weights in bf16, the `bn` statistics in fp32, order (pi, pj, c)."""
    vae = build_vae()
    vae.save_config(vae_dir(root))
    kept = {k: v for k, v in state.items() if k != "bn.num_batches_tracked"}
    rounded = {k: v if k.startswith("bn.") else v.bfloat16() for k, v in kept.items()}
    rounded["bn.num_batches_tracked"] = torch.tensor(0)
    _write(rounded, vae_dir(root) / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def load_vae(root: Path):
    """The committed VAE in fp32."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_pretrained(
        vae_dir(root), torch_dtype=torch.float32, local_files_only=True
    )
    return vae.eval().requires_grad_(False)


def for_presets(state: StateDict, copy: Copy, strength: float = STRENGTH) -> StateDict:
    """c' = w / 7 * c and u' = (w - 1) / 6 * u, so that 7 c' - 6 u' = w c - (w - 1) u.

    The presets guide with a factor of 7. At 128 x 64 px their first step crosses a quarter of the
    path, and a true factor of 7 overshoots there by far; this makes it a true factor of w. Only
    the last linear layer is scaled.
    """
    factor = strength / 7 if copy == "cond" else (strength - 1) / 6
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    return state | {name: state[name] * factor for name in names}


def export(work: Path, root: Path) -> None:
    """All committed weights from the last checkpoints under `work`."""
    for copy in ("cond", "uncond"):
        state = torch.load(work / f"{copy}_end.pt", weights_only=True)["ema"]
        export_transformer(for_presets(state, copy), copy, root)
    export_encoder(work / "tokenizer", root)
    export_vae(torch.load(work / "vae_coarse_encoder.pt", weights_only=True)["model"], root)
