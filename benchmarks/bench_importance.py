"""Output error of linears quantized with a calibration and without, on the pocket model's inputs.

    python benchmarks/bench_importance.py [--types Q4_K INT8] [--strength 128]

Moments come from prompts of the training kind, the error from held-out prompts: dB of output SQNR
of each kind of linear (mean over its layers), and what the calibration adds to it, lowest layer and
mean: scales searched by importance, then codes rounded with error feedback too. GGUF types beside
ggml's unweighted encoder; INT8 (rotated, activations of 8 bits too) beside rounding to nearest.
Healthy, and with each disease for w2, whose inputs it changes. About a CPU minute.
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
from ideogram4_quant.ops.reference import int8_linear
from ideogram4_quant.pocket.data import HELD_OUT, prompt_batch
from ideogram4_quant.pocket.diseases import infect, sick_config
from ideogram4_quant.pocket.encoder import CaptionEncoder
from ideogram4_quant.pocket.evaluate import Pocket, load_pocket, noise_for
from ideogram4_quant.pocket.export import from_canonical
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.pocket.transformer import DEFAULT_GUIDANCE, build_transformer, sample
from ideogram4_quant.quant.encodings import Blocks, NativeInt8
from ideogram4_quant.quant.input_moments import InputMoments
from ideogram4_quant.quant.layer_stats import LayerStats

TYPES = ("INT8", "Q8_0", "Q6_K", "Q5_K", "Q4_K")
ROTATION = 256
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


def blocks_output(
    weight: Tensor, qtype: str, moments: InputMoments | None, feedback: bool, x: Tensor
) -> Tensor:
    """``x`` through ``weight`` as ggml stores it, or by the moments."""
    if moments is None:
        stored = quantize(weight, qtype, as_ggml=True)
    else:
        encoding = Blocks(qtype, tuple(weight.shape)).led_by(moments, feedback=feedback)
        stored = encoding.encode(weight)["weight"]
    return x @ dequantize(stored, qtype, weight.shape).T


def int8_output(weight: Tensor, moments: InputMoments | None, x: Tensor) -> Tensor:
    """``x`` through ``weight`` in rotated W8A8."""
    encoding = NativeInt8(ROTATION)
    encoding = encoding if moments is None else encoding.led_by(moments, feedback=True)
    parts = encoding.encode(weight)
    return int8_linear(x, parts["weight"], parts["weight_scale"][:, 0], rotation=ROTATION)


def gains(weight: Tensor, moments: InputMoments, fresh: Tensor, qtype: str) -> list[float]:
    """Output SQNR in dB without a calibration; what importance adds, and feedback with it."""
    wanted = fresh @ weight.T

    def sqnr(moments: InputMoments | None, feedback: bool) -> float:
        if qtype == "INT8":
            found = int8_output(weight, moments if feedback else None, fresh)
        else:
            found = blocks_output(weight, qtype, moments, feedback, fresh)
        return 10 * math.log10(wanted.square().sum() / (found - wanted).square().sum())

    plain = sqnr(None, False)
    return [plain, sqnr(moments, False) - plain, sqnr(moments, True) - plain]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=["INT8", *FORMATS], default=TYPES)
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
            moments = LayerStats.of(calibrating, weight).moments
            for qtype in options.types:
                kind = canonical.split(".", 2)[2]
                found[qtype, health, kind].append(gains(weight, moments, drawn, qtype))
    print(f"{'':36}{'without':>10}{'importance':>16}{'and feedback':>16}")
    head = f"{'type':6}{'health':10}{'linear':20}{'dB':>10}"
    print(head + 2 * f"{'least':>9}{'mean':>7}")
    for (qtype, health, kind), rows in sorted(found.items()):
        plain, *added = zip(*rows, strict=True)
        line = f"{qtype:6}{health:10}{kind:20}{sum(plain) / len(plain):10.2f}"
        print(line + "".join(f"{min(each):+9.2f}{sum(each) / len(each):+7.2f}" for each in added))


if __name__ == "__main__":
    main()
