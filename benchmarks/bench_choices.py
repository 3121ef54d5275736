"""What the nodes' choices cost on the pocket model: GGUF compute, savings, one copy alone.

    python benchmarks/bench_choices.py [--prompts 24] [--write]

Every choice paints the same held-out prompts at the Default preset from the same noise, in turns;
the GGUF choices paint the first quarter of them. ``sqnr`` is the latent SQNR after the last step
against BF16 with everything on (dB, mean over prompts), ``words`` how many pictures are read
exactly, ``time`` the processor time of the median picture over that of BF16, or for GGUF over that
of the other compute. ``linear`` is one GGUF linear of the real model (4608 x 4608, 512 tokens)
computed as W8A8, over the time of the same in 16-bit compute; on a CPU that is float32.

``--write`` puts the figures where the nodes' reports read them (nodes/costs.json).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ideogram4_quant.engine.compare.metrics import latent_sqnr
from ideogram4_quant.engine.demo import Inputs, pocket_inputs
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, generate
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.engine.ocr import WordReader
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.ops import blocks
from ideogram4_quant.ops.linear import LinearOptions, gguf_linear
from ideogram4_quant.quant import RECIPES, quantize_checkpoint

OUT = Path(__file__).resolve().parents[1] / "nodes" / "costs.json"
GGUF_LEVELS = tuple(recipe.level for recipe in RECIPES.values() if recipe.file_format == "gguf")
SAVINGS = {
    "conditional alone": {},
    "guidance until half": {"interval": (0.0, 0.5)},
    "reuse 2": {"reuse": 2},
}
FEATURES, TOKENS = 4608, 512
GGUF_PART = 4  # of the prompts, one in so many


@dataclass
class Choice:
    """Models, the request's settings, and what its pictures came to."""

    models: Models
    settings: dict
    latents: list[Tensor]
    seconds: list[float]
    words: int = 0


def choices(inputs: Inputs, folder: Path) -> Iterator[tuple[str, Choice]]:
    """name -> choice; the first is the reference."""
    vae = load_vae(inputs.vae, device="cpu")
    files = inputs.conditional, inputs.unconditional
    plain = load_pair(open_pair(*files), None, vae, device="cpu")
    yield "BF16", Choice(plain, {}, [], [])
    for name, settings in SAVINGS.items():
        alone = name == "conditional alone"
        models = replace(plain, unconditional=None) if alone else plain
        yield name, Choice(models, settings, [], [])
    for level in GGUF_LEVELS:
        made = [folder / f"{level}-{number}.gguf" for number in range(2)]
        for source, out in zip(files, made, strict=True):
            quantize_checkpoint(source, level, out)
        for compute in ("w8a8", "dense"):
            options = LinearOptions(gguf_compute=compute)
            models = load_pair(open_pair(*made), None, vae, device="cpu", options=options)
            yield f"{level} {compute}", Choice(models, {}, [], [])


def paint(inputs: Inputs, found: dict[str, Choice]) -> None:
    """Every prompt with every choice in turn; reads the words of those that change guidance."""
    reader = WordReader()
    encoder = load_encoder(inputs.encoder, device="cpu")
    features = encoder.encode([prompt.caption for prompt in inputs.prompts])
    for number, (prompt, text) in enumerate(zip(inputs.prompts, features, strict=True)):
        for name, choice in found.items():
            gguf = name.partition(" ")[0] in GGUF_LEVELS
            if gguf and number >= max(len(features) // GGUF_PART, 1):
                continue
            request = GenerateRequest(
                prompt.caption, prompt.width, prompt.height, prompt.seed, **choice.settings
            )
            started = time.process_time()
            result = generate(request, choice.models, features=text)
            choice.seconds.append(time.process_time() - started)
            choice.latents.append(result.latents)
            if not gguf:
                choice.words += reader.read(result.image) == prompt.word
        print(prompt.word, flush=True)


def figures(found: dict[str, Choice]) -> dict:
    """name -> its figures; each GGUF compute is timed against the other one."""
    reference = found["BF16"]
    rows = {}
    for name, choice in found.items():
        level, _, compute = name.partition(" ")
        against = found[f"{level} dense"] if compute in ("w8a8", "dense") else reference
        latents = torch.stack(choice.latents)
        wanted = torch.stack(reference.latents[: len(latents)])
        rows[name] = {
            "sqnr": round(statistics.fmean(latent_sqnr(wanted, latents)), 1),
            "time": ratio(choice.seconds, against.seconds),
        }
        if level not in GGUF_LEVELS:
            rows[name]["words"] = choice.words
    rows["BF16"]["sqnr"] = None
    return rows


def linear_ratios(rounds: int = 2) -> dict[str, float]:
    """level -> time of W8A8 over 16-bit compute, one linear of the real model, runs in turns."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
    x = torch.randn(TOKENS, FEATURES, generator=generator)
    ratios = {}
    for level in GGUF_LEVELS:
        data = blocks.quantize(weight, level)

        def run(compute: str, data: Tensor = data, level: str = level) -> Callable[[], Tensor]:
            return lambda: gguf_linear(x, data, level, tuple(weight.shape), compute=compute)

        times: dict[str, list[float]] = {"w8a8": [], "dense": []}
        for index in range(rounds + 1):  # the first round warms up
            for compute, taken in times.items():
                started = time.process_time()
                run(compute)()
                if index:
                    taken.append(time.process_time() - started)
        ratios[level] = ratio(times["w8a8"], times["dense"])
    return ratios


def ratio(times: Sequence[float], against: Sequence[float]) -> float:
    """Of the medians."""
    return round(statistics.median(times) / statistics.median(against), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name} of the nodes")
    args = parser.parse_args()
    inputs = pocket_inputs(args.prompts)
    ratios = linear_ratios()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(choices(inputs, Path(folder)))
        paint(inputs, found)
    result = {
        "prompts": args.prompts,
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__.partition("+")[0],
        "linear": ratios,
        "choices": figures(found),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.write:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
