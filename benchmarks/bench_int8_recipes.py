"""INT8 recipes on the pocket model, well and sick: what each does to linears and pictures.

    python benchmarks/bench_int8_recipes.py [--models clean channels ...]
        [--recipes convrot auto ...] [--skip 6] [--prompts 12] [--json F]

Calibrates on training captions, writes each recipe's files with ``quantize``, and compares on
held-out captions: the output SQNR of each quantized linear on the inputs that the bf16 model gives
it, and the SQNR of the final latents over whole runs at the same noise, in dB, with the paired
difference to the first recipe; +- is half a 95 % interval over captions. ``paper`` is SmoothQuant
0.5 with the 8 % most fragile linears in bf16 (arXiv 2606.12280). The first 6 captions were looked
at while the choice of treatments was worked out, all of them for what smoothing has to gain.

With --skip 6 --prompts 58 --calibration 8, convrot and the differences of rotated and auto to it:
clean 43.6 +- 0.4 dB, +2.8 +- 0.5, +3.1 +- 0.4; channels 31.5 +- 0.7, +7.6 +- 0.3, +13.9 +- 0.7;
tokens 43.3 +- 0.4, +2.6 +- 0.4, +2.8 +- 0.4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ideogram4_quant.engine.calibrate import Prompt, calibrate, watched
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, initial_noise, sample
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.engine.transformer import prepare
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.pocket import data, paths
from ideogram4_quant.pocket.table.models import VARIANTS, Variant, write_model
from ideogram4_quant.quant import Calibration, QuantOptions, quantize_checkpoint
from ideogram4_quant.quant.profiler import ProfilerOptions
from ideogram4_quant.quant.provenance import combined_hash, hash_files
from ideogram4_quant.quant.tables import text_table

PAPER_SHARE = 17 / 211
NEAREST = {"rounding": "nearest"}

# name -> (level, options beside the calibration)
RECIPES: dict[str, tuple[str, dict]] = {
    # as others have it: codes rounded to nearest
    "convrot": ("INT8 W8A8 rotated", NEAREST),
    "naive": ("INT8 W8A8", NEAREST),
    "smooth": ("INT8 W8A8", {"alpha": 0.5, **NEAREST}),
    "paper": ("INT8 W8A8", {"alpha": 0.5, "protect_share": PAPER_SHARE, **NEAREST}),
    # ours: with error feedback
    "rotated": ("INT8 W8A8 rotated", {}),
    "auto-native": ("INT8 W8A8 rotated", {"treatment": "auto-native"}),
    "auto-native-8%": (
        "INT8 W8A8 rotated", {"treatment": "auto-native", "protect_share": PAPER_SHARE},
    ),
    "folded": ("INT8 W8A8 rotated", {"fold": ("all",), "alpha": 0.5}),
    "auto": ("INT8 W8A8 rotated", {"treatment": "auto"}),
    "auto-8%": (
        "INT8 W8A8 rotated", {"treatment": "auto", "protect_share": PAPER_SHARE},
    ),
}  # fmt: skip


def db(noise: float, signal: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def runs(models: Models, prompts: Sequence[Prompt], seeds: Sequence[int], request) -> list[Tensor]:
    """Final latents [32, 128] of each prompt."""
    steps, latents = request.plan(), []
    unconditional = prepare(models.unconditional, 4, 8)
    for prompt, seed in zip(prompts, seeds, strict=True):
        conditional = prepare(models.conditional, 4, 8, prompt.features[None])
        noise = initial_noise(seed, 32, 128)
        *_, (_, x) = sample(models, steps, noise, conditional, unconditional)
        latents.append(x[0])
    return latents


class LinearErrors:
    """Squared output errors of ``systems``' weights on the inputs of the reference's linears."""

    def __init__(self, reference: Models, systems: dict[str, Models]) -> None:
        self._weights = {name: watched(models) for name, models in systems.items()}
        self.sums: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
        self._hooks = [
            module.register_forward_hook(self._hook(key))
            for key, module in watched(reference).items()
            if ".layers." in key
        ]

    def _hook(self, key: str):
        def see(module: nn.Module, args: tuple[Tensor, ...], wanted: Tensor) -> None:
            true = wanted if module.bias is None else wanted - module.bias
            signal = true.double().square().sum().item()
            for name, modules in self._weights.items():
                error = linear(args[0], modules[key].weight) - true
                total = self.sums[name].setdefault(key, [0.0, 0.0])
                total[0] += error.double().square().sum().item()
                total[1] += signal

        return see

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def figures(self, name: str) -> list[float]:
        """SQNR in dB of every linear in the blocks."""
        return [db(noise, signal) for noise, signal in self.sums[name].values()]


def encode(captions: Sequence[str]) -> list[Prompt]:
    features = load_encoder(paths.encoder_dir()).encode(captions)
    return [Prompt(text, each) for text, each in zip(captions, features, strict=True)]


def load(files: dict[str, Path]) -> Models:
    return load_pair(open_pair(files["conditional"], files["unconditional"]), None, None)


def written(name: str, source: dict[str, Path], folder: Path, calibration: Calibration) -> dict:
    """Both copies' files of a recipe, and how many linears stay in bf16."""
    level, options = RECIPES[name]
    files, kept = {}, 0
    for copy, path in source.items():
        files[copy] = folder / f"{len(list(folder.iterdir()))}.safetensors"
        report = quantize_checkpoint(
            path, level, files[copy], copy=copy,
            options=QuantOptions(calibration=calibration, **options),
        )  # fmt: skip
        kept += sum(tensor.protected for tensor in report.tensors)
    return {"files": files, "bf16": kept, "bytes": sum(f.stat().st_size for f in files.values())}


def measure(
    variant: Variant,
    recipes: Sequence[str],
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    seeds: Sequence[int],
    steps: int,
) -> list[dict]:
    """One row a recipe on one model."""
    request = GenerateRequest("", data.WIDTH, data.HEIGHT, steps=steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_model(variant, folder)
        reference = load(source)
        calibration = calibrate(
            reference, prompts, request, options=ProfilerOptions(blocks=()),
            digests={copy: combined_hash(hash_files([f])) for copy, f in source.items()},
        )  # fmt: skip
        made = {recipe: written(recipe, source, folder, calibration) for recipe in recipes}
        systems = {recipe: load(each["files"]) for recipe, each in made.items()}
        errors = LinearErrors(reference, systems)
        wanted = runs(reference, held_out, seeds, request)
        errors.remove()
        rows = []
        for recipe, models in systems.items():
            latents = runs(models, held_out, seeds, request)
            pairs = zip(latents, wanted, strict=True)
            fidelity = [
                db((a - b).square().sum().item(), b.square().sum().item()) for a, b in pairs
            ]
            figures = errors.figures(recipe)
            rows.append(
                {
                    "model": variant.name,
                    "recipe": recipe,
                    "bf16": made[recipe]["bf16"],
                    "bytes": made[recipe]["bytes"],
                    "linears_db": dict(zip(errors.sums[recipe], figures, strict=True)),
                    "linear_worst_db": min(figures),
                    "linear_median_db": statistics.median(figures),
                    "latents_db": fidelity,
                }
            )
    return rows


def with_interval(values: Sequence[float]) -> tuple[str, str]:
    """The mean, and half of its 95 % interval."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.1f}", f"{1.96 * spread:.1f}"


def table(rows: Sequence[dict]) -> str:
    head = ("model", "recipe", "bf16", "worst dB", "median dB", "latents dB", "+-", "paired", "+-")
    cells, first = [], {}
    for row in rows:
        values = row["latents_db"]
        first.setdefault(row["model"], values)
        paired = [a - b for a, b in zip(values, first[row["model"]], strict=True)]
        cells.append(
            (
                row["model"],
                row["recipe"],
                str(row["bf16"]),
                f"{row['linear_worst_db']:.1f}",
                f"{row['linear_median_db']:.1f}",
                *with_interval(values),
                *with_interval(paired),
            )
        )
    return text_table(head, cells, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[v.slug for v in VARIANTS])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--skip", type=int, default=0, help="held-out captions to leave out first")
    parser.add_argument("--prompts", type=int, default=6, help="held-out captions")
    parser.add_argument("--calibration", type=int, default=4, help="training captions")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = encode([p.caption for p in data.prompt_batch("calibration", args.calibration)])
    chosen = data.HELD_OUT[args.skip : args.skip + args.prompts]
    held_out, seeds = encode([p.caption for p in chosen]), [p.seed for p in chosen]
    rows = []
    for variant in VARIANTS:
        if args.models is None or variant.slug in args.models:
            rows += measure(variant, args.recipes, prompts, held_out, seeds, args.steps)
            print(table([row for row in rows if row["model"] == variant.name]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
