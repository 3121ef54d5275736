"""For tests of folding: files, a calibration by hooks, and a block of the model in fp64 torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine import transformer
from ideogram4_quant.engine.linear import QuantLinear
from ideogram4_quant.quant.calibration import Calibration
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.tests import quant_model
from ideogram4_quant.tests.fold_writer import write_folded

TIMES = (0.1, 0.5, 0.9)
PROTECTED = ("layers.1.feed_forward.w3", "layers.1.attention.o")
LEVELS = ("INT8 W8A8", "INT8 W8A8 rotated", "Q8_0", "Q4_K")


@dataclass(frozen=True)
class FoldedCase:
    """A bf16 source with its weights and calibration, and folded files by level."""

    weights: dict[str, Tensor]
    source: Path
    calibration: Calibration
    files: dict[str, Path]


def loud_weights() -> dict[str, Tensor]:
    """Random weights with loud FFN channels, as the real model has, and loud inputs of qkv."""
    made = quant_model.weights(3)
    for i in range(2):
        made[f"layers.{i}.feed_forward.w3.weight"][[5, 77, 300]] *= 64
        made[f"layers.{i}.feed_forward.w2.weight"][:, [5, 77, 300]] /= 64
        made[f"layers.{i}.attention_norm1.weight"][[3, 100]] *= 32
        made[f"layers.{i}.attention.qkv.weight"][:, [3, 100]] /= 32
    return made


def written(folder: Path) -> FoldedCase:
    """The case in ``folder``; one w3 and one o of each folded file are protected."""
    weights = loud_weights()
    source = quant_model.write(folder / "bf16.safetensors", weights)
    calibration = calibrate(source)
    files = {}
    for level in LEVELS:
        files[level] = folder / f"{level}.{'gguf' if level[0] == 'Q' else 'safetensors'}"
        write_folded(source, level, files[level], calibration, protect=PROTECTED)
    return FoldedCase(weights, source, calibration, files)


def db(found: Tensor, wanted: Tensor) -> float:
    """SQNR in dB."""
    noise = (found.double() - wanted.double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(wanted.double().square().sum() / noise)


def inputs(seed: int = 0, text: int = 9, width: int = 832) -> list[tuple[Tensor, float, Tensor]]:
    """(latents, time, text features) of a few passes at 64 x 128 px."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(1, 32, 128, generator=generator),
            time,
            torch.randn(1, text, width, generator=generator),
        )
        for time in TIMES
    ]


def run(model: torch.nn.Module, passes: list[tuple[Tensor, float, Tensor]]) -> Tensor:
    """The velocities of all passes."""
    with torch.inference_mode():
        return torch.cat(
            [
                transformer.velocity(model, x, t, transformer.prepare(model, 4, 8, features))
                for x, t, features in passes
            ]
        )


def load(path: Path, copy: str = "conditional") -> torch.nn.Module:
    return transformer.load_transformer(open_checkpoint(path), copy, device="cpu")


def linears(model: torch.nn.Module) -> dict[str, QuantLinear]:
    """Canonical module name -> linear."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {transformer.canonical_name(f"{n}.").removesuffix("."): m for n, m in found.items()}


def calibrate(path: Path, copy: str = "conditional") -> Calibration:
    """What each linear sees in :func:`inputs`."""
    model, layers, handles = load(path, copy), {}, []
    for name, linear in linears(model).items():

        def watch(module, args, key=f"{copy}.{name}"):
            stats = LayerStats.of(args[0].flatten(0, -2), module.weight)
            layers[key] = layers[key].plus(stats) if key in layers else stats

        handles.append(linear.register_forward_pre_hook(watch))
    run(model, inputs())
    return Calibration(layers, (0.0,))


def as_a_stock_host_sees_it(path: Path, out: Path) -> Path:
    """A folded safetensors file without the record of what was folded."""
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "lora_basis"}
    kept = {k: t for k, t in load_file(path).items() if not k.startswith("fold.")}
    save_file(kept, out, metadata)
    return out


def block(state: dict[str, Tensor], x: Tensor, features: Tensor, scales: Tensor, heads: int = 2):
    """Layer 0 on ``x`` [L, hidden] and the text projection, in the dtype given.

    ``scales`` [4, hidden]: adaLN's. Without rotary embedding, which acts on q and k alone.
    """

    def w(name: str) -> Tensor:
        return state[f"layers.0.{name}.weight"]

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values * (values.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    length, head_dim = len(x), x.shape[1] // heads
    qkv = (norm(x, w("attention_norm1")) * (1 + scales[0])) @ w("attention.qkv").T
    q, k, v = qkv.view(length, 3, heads, head_dim).permute(1, 2, 0, 3)
    q, k = norm(q, w("attention.norm_q")), norm(k, w("attention.norm_k"))
    mixed = (q @ k.transpose(1, 2) / head_dim**0.5).softmax(-1) @ v
    out = mixed.transpose(0, 1).reshape(length, -1) @ w("attention.o").T
    x = x + scales[1].tanh() * norm(out, w("attention_norm2"))
    h = norm(x, w("ffn_norm1")) * (1 + scales[2])
    inner = F.silu(h @ w("feed_forward.w1").T) * (h @ w("feed_forward.w3").T)
    x = x + scales[3].tanh() * norm(inner @ w("feed_forward.w2").T, w("ffn_norm2"))
    text = norm(features, state["llm_cond_norm.weight"]) @ state["llm_cond_proj.weight"].T
    return torch.cat((x, text))
