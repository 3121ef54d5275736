"""Output error of GGUF blocks with and without importance, on the pocket model's own activations.

    python benchmarks/bench_importance.py [--types Q4_K Q6_K] [--strength 128]

Second moments come from prompts of the training kind, the error from held-out prompts: dB of output
SQNR of each kind of linear (mean over its layers) as ggml's unweighted encoder stores it, and what
importance gains, lowest layer and mean. Healthy, and with each disease for w2, whose inputs it
changes. About two CPU minutes.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ideogram4_quant.ops.blocks import FORMATS, dequantize, quantize
from ideogram4_quant.pocket.data import HELD_OUT, prompt_batch
from ideogram4_quant.pocket.diseases import infect, sick_config
from ideogram4_quant.pocket.encoder import CaptionEncoder
from ideogram4_quant.pocket.evaluate import Pocket, load_pocket, noise_for
from ideogram4_quant.pocket.export import from_canonical
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.pocket.transformer import DEFAULT_GUIDANCE, build_transformer, sample

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
CANONICAL = {"attention.to_q": "attention.qkv", "attention.to_out.0": "attention.o"}
TOKENS = 2048  # of each layer's inputs, drawn over all steps and prompts


def inputs(model: nn.Module, pocket: Pocket, prompts: list) -> dict[str, Tensor]:
    """Linear's name (diffusers') -> all its inputs [tokens, in_features] over 20 steps."""
    seen = defaultdict(list)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    ]
    features, lengths = pocket.encoder([prompt.caption for prompt in prompts])
    sample(model, pocket.uncond, features, lengths, noise_for(prompts), DEFAULT_GUIDANCE)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def cases(pocket: Pocket, strength: float) -> Iterator[tuple[str, dict, dict, dict]]:
    """(health, canonical weights, calibration inputs, held-out inputs by diffusers' name)."""
    healthy = load_file(dit_path("cond"))
    encoder: CaptionEncoder = pocket.encoder
    for health in ("healthy", "channels", "tokens"):
        config, state = None, healthy
        if health != "healthy":
            config, state = sick_config(health), infect(healthy, health, strength, encoder=encoder)
        model = build_transformer(config).eval()
        model.load_state_dict({k: v.float() for k, v in from_canonical(state).items()})
        calibration = inputs(model, pocket, prompt_batch("calibrate", 12))
        yield health, state, calibration, inputs(model, pocket, list(HELD_OUT)[:8])


def gains(weight: Tensor, calibration: Tensor, fresh: Tensor, qtype: str) -> tuple[float, float]:
    """(output SQNR in dB without importance, what importance adds to it)."""
    second_moment = calibration.double().square().mean(0).float()
    wanted = fresh @ weight.T

    def sqnr(importance: Tensor | None) -> float:
        blocks = quantize(weight, qtype, importance, as_ggml=importance is None)
        stored = dequantize(blocks, qtype, weight.shape)
        return 10 * math.log10(wanted.square().sum() / (fresh @ stored.T - wanted).square().sum())

    plain = sqnr(None)
    return plain, sqnr(second_moment) - plain


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=list(FORMATS), default=TYPES)
    parser.add_argument("--strength", type=float, default=128.0, help="of the diseases")
    options = parser.parse_args()
    found = defaultdict(list)
    for health, state, calibration, fresh in cases(load_pocket(), options.strength):
        generator = torch.Generator().manual_seed(0)
        for name, calibrating in calibration.items():
            canonical = name
            for here, there in CANONICAL.items():
                canonical = canonical.replace(here, there)
            if "to_" in canonical or (health != "healthy" and "w2" not in name):
                continue  # to_k and to_v have the inputs of to_q
            weight = state[f"{canonical}.weight"].float()
            drawn = fresh[name][torch.randperm(len(fresh[name]), generator=generator)[:TOKENS]]
            for qtype in options.types:
                kind = canonical.split(".", 2)[2]
                found[qtype, health, kind].append(gains(weight, calibrating, drawn, qtype))
    print(f"{'type':6}{'health':10}{'linear':20}{'plain dB':>10}{'least gain':>12}{'mean':>8}")
    for (qtype, health, kind), pairs in sorted(found.items()):
        plain = sum(p for p, _ in pairs) / len(pairs)
        mean = sum(g for _, g in pairs) / len(pairs)
        least = min(g for _, g in pairs)
        print(f"{qtype:6}{health:10}{kind:20}{plain:10.2f}{least:+12.2f}{mean:+8.2f}")


if __name__ == "__main__":
    main()
