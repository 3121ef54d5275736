"""What a size buys: files chosen for 4.3 to 8 bits beside single levels and peers, and whether the
error foretold is the one that comes.

    python benchmarks/bench_chooser.py --out docs [--work pocket-table] [--prompts 32] [--alone]

On the pocket model as trained, with loud channels and with loud tokens. Calibrated, and gains
measured, on training captions; pictures of held-out captions, one seed each, default preset. Writes
``chooser.csv``, ``chooser-random.csv``, ``images/chooser-pareto.png`` and
``images/chooser-foretold.png``; other programs' points are those of ``pocket-levels.csv`` there.
Prints how well random choices are foretold, and with ``--alone`` each linear quantized by itself
(``chooser-alone.csv``). Goes on where it was broken off. About an hour of a core.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from ideogram4_quant.engine.calibrate import Prompt
from ideogram4_quant.engine.compare.statistics import Interval, mean_interval
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, initial_noise, sample
from ideogram4_quant.engine.sensitivity import Probes, measure_sensitivity
from ideogram4_quant.engine.transformer import load_transformer, prepare
from ideogram4_quant.ops.layouts import gguf_tensor, int8_tensor, w4a4_tensor, w4a8_tensor
from ideogram4_quant.pocket.data import HEIGHT, HELD_OUT, WIDTH, prompt_batch
from ideogram4_quant.pocket.paths import encoder_dir
from ideogram4_quant.pocket.table.calibrating import calibration_of
from ideogram4_quant.pocket.table.models import COPIES, VARIANTS, Variant, in_memory, state_of
from ideogram4_quant.pocket.table.painting import PRESET, Studio
from ideogram4_quant.pocket.table.systems import is_block_linear, unpacked
from ideogram4_quant.quant.allocation import Rung, allocate, without
from ideogram4_quant.quant.candidate_errors import candidate_errors
from ideogram4_quant.quant.choose import int8_choices
from ideogram4_quant.quant.encodings import Blocks, Encoding, NativeInt8, stored_bytes
from ideogram4_quant.quant.int4_encoding import ConvrotInt4
from ideogram4_quant.quant.packed_encoding import PackedInt8
from ideogram4_quant.quant.recipes import QuantOptions
from ideogram4_quant.quant.sensitivity import Gain, Sensitivity, default_gain
from ideogram4_quant.quant.storage import INT4, STORAGES, storage_encoding
from ideogram4_quant.sampling import grid_size

MODELS = tuple(v for v in VARIANTS if not v.stress)
BITS = {"native": (4.3, 4.4, 4.6, 5.0, 5.5, 6.0, 7.0, 8.0, 8.1), "gguf": (4.3, 5.0, 6.0, 7.0, 8.0)}
SINGLE = {
    "native": ("W4A4", "W4A8 g32", "W4A8 g16", "W6A8 g16", "INT8"),
    "gguf": ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
}
BUILT_IN = (4.4, 4.6, 6.0, 7.0)  # native
RANDOM, RANDOM_PROMPTS, RANDOM_SEED = 24, 8, 17
ALONE, ALONE_PROMPTS = ("W4A8 g16", "W4A4"), 4
CALIBRATION_PROMPTS = 16
REFERENCE = "W4A8 g16"
FIELDS = ("model", "container", "chosen", "bits", "foretold", "dB", "low", "high", "prompts")

Linear = tuple[str, str]


class Model:
    """One model of the table: its weights, gains and errors, and its pictures by storage."""

    def __init__(self, variant: Variant, work: Path, studio: Studio) -> None:
        self.variant, self.work, self.studio = variant, work, studio
        self.calibration = calibration_of(variant, work)
        self.options = QuantOptions(calibration=self.calibration)
        self.state = {copy: state_of(variant, copy) for copy in COPIES}
        self.linears: dict[Linear, tuple[int, int]] = {
            (copy, name.removesuffix(".weight")): tuple(tensor.shape)
            for copy, state in self.state.items()
            for name, tensor in state.items()
            if is_block_linear(name)
        }
        self.int8 = int8_choices("native", self.options, self.linears)
        self.stored, self.rungs = cache(self._stored), cache(self._rungs)
        self.values = sum(n * k for n, k in self.linears.values())

    def encoding(self, container: str, key: Linear, name: str) -> Encoding | None:
        return storage_encoding(name, container, self.linears[key], self.int8.get(key))

    @cached_property
    def gains(self) -> dict[Linear, Gain]:
        """Measured on training captions, with the error of calibrated W4A8."""
        path = self.work / "chooser" / f"{self.variant.slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = Sensitivity.load(path) if path.is_file() else None
        texts = [p.caption for p in prompt_batch("calibration", CALIBRATION_PROMPTS)]
        features = load_encoder(encoder_dir(), device="cpu").encode(texts)
        quantized = {
            ".".join(key): self.stored("native", key, REFERENCE).dequantize()
            for key in self.linears
        }
        found = measure_sensitivity(
            Models(*(self.transformer(c, self.state[c]) for c in COPIES), None, None),
            quantized,
            [Prompt(*each) for each in zip(texts, features, strict=True)],
            GenerateRequest("", WIDTH, HEIGHT, preset=PRESET),
            probes=Probes(directions=1),
            digests={},
            settings={"captions": CALIBRATION_PROMPTS},
            earlier=earlier,
            keep=lambda found: found.save(path, overwrite=True),
        )
        return {key: found.gain(*key) for key in self.linears}

    def _rungs(self, container: str, gains: str = "measured") -> dict[Linear, list[Rung]]:
        """Of every linear; ``gains``: "measured", or the "built-in" ones."""
        found = {}
        for key, shape in self.linears.items():
            weight = self.state[key[0]][f"{key[1]}.weight"]
            stats, int8 = self.calibration.layer(*key), self.int8.get(key)
            losses = candidate_errors(weight, STORAGES[container], container, stats, int8)
            gain = self.gains[key] if gains == "measured" else default_gain(*key, 4)
            found[key] = [
                Rung(stored_bytes(self.encoding(container, key, name), shape), gain.of(loss), name)
                for name, loss in losses.items()
            ]
        return found

    def _stored(self, container: str, key: Linear, name: str) -> Tensor:
        """The weight as a file of this storage gives it."""
        weight = self.state[key[0]][f"{key[1]}.weight"].float()
        encoding = self.encoding(container, key, name)
        if name == "BF16":
            return weight
        led = encoding.led_by(self.calibration.layer(*key).moments, feedback=True)
        parts = led.encode(weight)
        if isinstance(encoding, Blocks):
            return gguf_tensor(parts["weight"], name, tuple(weight.shape), dtype=torch.float32)
        if isinstance(encoding, NativeInt8):
            return int8_tensor(
                parts["weight"], parts["weight_scale"], dtype=torch.float32,
                rotation=encoding.rotation, smooth=encoding.smooth,
            )  # fmt: skip
        if isinstance(encoding, ConvrotInt4):
            return w4a4_tensor(
                parts["weight"], parts["weight_scale"], dtype=torch.float32,
                rotation=encoding.rotation,
            )  # fmt: skip
        assert isinstance(encoding, PackedInt8)
        return w4a8_tensor(
            parts["weight"], parts["weight_s_rel"], parts["weight_s_channel"],
            dtype=torch.float32, group_size=encoding.group, rotation=encoding.rotation,
            codebook=encoding.constants().get("weight_codebook"),
        )  # fmt: skip

    def transformer(self, copy: str, tensors: Mapping[str, Tensor]):
        return load_transformer(
            in_memory(self.variant, unpacked(dict(tensors), "w4a4")), copy, device="cpu"
        )

    @cached_property
    def truth(self) -> Tensor:
        return self.latents(self.state, len(HELD_OUT))

    def latents(self, state: Mapping[str, Mapping[str, Tensor]], prompts: int) -> Tensor:
        """Final latents [prompts, tokens, channels], captions of one length at once."""
        both = Models(*(self.transformer(c, state[c]) for c in COPIES), None, None)
        return sampled(both, self.studio, prompts)

    def measured(self, container: str, chosen: Mapping[Linear, str], prompts: int) -> Interval:
        """Latent SQNR in dB with every linear stored as chosen."""
        state = {copy: dict(tensors) for copy, tensors in self.state.items()}
        for key, name in chosen.items():
            state[key[0]][f"{key[1]}.weight"] = self.stored(container, key, name)
        truth = self.truth[:prompts].double()
        noise = (self.latents(state, prompts) - truth).double().square().sum((1, 2))
        return mean_interval((10 * (truth.square().sum((1, 2)) / noise).log10()).tolist())


@torch.inference_mode()
def sampled(both: Models, studio: Studio, prompts: int) -> Tensor:
    """Final latents of the first held-out captions, one seed each."""
    cases = HELD_OUT[:prompts]
    rows, columns = grid_size(WIDTH, HEIGHT)
    unconditional = prepare(both.unconditional, rows, columns)
    found: list[Tensor | None] = [None] * prompts
    by_length: dict[int, list[int]] = {}
    for i, case in enumerate(cases):
        by_length.setdefault(len(studio.features[case.caption]), []).append(i)
    for batch in by_length.values():
        features = torch.stack([studio.features[cases[i].caption] for i in batch])
        conditional = prepare(both.conditional, rows, columns, features)
        channels = both.conditional.config.in_channels
        noise = [initial_noise(cases[i].seed, rows * columns, channels) for i in batch]
        *_, (_, x) = sample(both, studio.steps, torch.cat(noise), conditional, unconditional)
        for i, latent in zip(batch, x, strict=True):
            found[i] = latent.clone()
    return torch.stack(found)


def choices(model: Model) -> Iterator[tuple[str, str, dict[Linear, Rung]]]:
    """(container, what was asked, the choice) of every point of the plot."""
    for container, budgets in BITS.items():
        for bits in budgets:
            rungs = model.rungs(container)
            least = sum(min(rung.nbytes for rung in own) for own in rungs.values())
            budget = max(
                least, int(bits * model.values / 8)
            )  # a row's scale is much of a short row
            yield container, f"{bits:g} bits", allocate(rungs, budget)
    for bits in BUILT_IN:
        budget = int(bits * model.values / 8)
        found = allocate(without(model.rungs("native", "built-in"), INT4, budget), budget)
        yield "native", f"{bits:g} bits, built-in gains", found
    for container, names in SINGLE.items():
        for name in names:
            rungs = model.rungs(container)
            single = {k: next(r for r in own if r.name == name) for k, own in rungs.items()}
            yield container, name, single


def random_choices(model: Model) -> Iterator[tuple[str, str, dict[Linear, Rung]]]:
    """Every linear stored by chance; each choice leans to other sizes."""
    chance = random.Random(RANDOM_SEED)
    rungs = model.rungs("native")
    for i in range(RANDOM):
        lean = [chance.random() ** 2 for _ in range(len(STORAGES["native"]))]
        found = {key: chance.choices(own, lean[: len(own)])[0] for key, own in rungs.items()}
        yield "native", f"random {i}", found


def alone(model: Model) -> Iterator[tuple[str, str, dict[Linear, Rung]]]:
    """One linear quantized, all others as they are."""
    rungs = {k: {r.name: r for r in own} for k, own in model.rungs("native").items()}
    whole = {key: own["BF16"] for key, own in rungs.items()}
    for name in ALONE:
        for key in rungs:
            yield "native", f"{name}: {'.'.join(key)}", whole | {key: rungs[key][name]}


def row(model: Model, container: str, asked: str, chosen: Mapping[Linear, Rung], prompts: int):
    loss = sum(rung.loss for rung in chosen.values())
    bits = 8 * sum(rung.nbytes for rung in chosen.values()) / model.values
    of = model.measured(container, {key: rung.name for key, rung in chosen.items()}, prompts)
    foretold = float(-10 * torch.tensor(max(loss, 1e-30)).log10())
    figures = (bits, foretold, of.mean, of.low, of.high)
    return [model.variant.name, container, asked, *(f"{x:.3f}" for x in figures), str(of.n)]


def fill(path: Path, wanted: Iterator, prompts: int) -> None:
    """Add the rows that the file lacks."""
    there = set()
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            there = {(r["model"], r["container"], r["chosen"]) for r in csv.DictReader(file)}
    else:
        path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    for model, container, asked, chosen in wanted:
        if (model.variant.name, container, asked) not in there:
            made = row(model, container, asked, chosen, prompts)
            with path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(made)
            print(*made, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("pocket-table"), metavar="DIR")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument(
        "--models", nargs="+", metavar="M", default=[v.name for v in MODELS], help="only these"
    )
    parser.add_argument("--alone", action="store_true", help="also each linear by itself")
    parser.add_argument("--plot", action="store_true", help="only draw what the files hold")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pareto, by_chance, by_itself = (
        args.out / f"chooser{what}.csv" for what in ("", "-random", "-alone")
    )
    if not args.plot:
        studio = Studio()
        for variant in (v for v in MODELS if v.name in args.models):
            model = Model(variant, args.work, studio)
            fill(pareto, ((model, *each) for each in choices(model)), args.prompts)
            fill(by_chance, ((model, *each) for each in random_choices(model)), RANDOM_PROMPTS)
            if args.alone:
                fill(by_itself, ((model, *each) for each in alone(model)), ALONE_PROMPTS)
    from chooser_plots import behind, draw, read, spread

    groups = {f"{m}, by chance": (by_chance, m, "random") for m in args.models}
    groups |= {f"{m}, {n} alone": (by_itself, m, n) for m in args.models for n in ALONE}
    for label, (path, model, start) in groups.items():
        rows = [r for r in read(path) if r["model"] == model and r["chosen"].startswith(start)]
        if len(rows) > 2:
            rank, mean, deviation = spread(rows)
            print(
                f"{label}: {len(rows)} choices, rank correlation {rank:.3f}, foretold minus "
                f"measured {mean:+.1f} dB, standard deviation {deviation:.1f}"
            )
    print("\n".join(behind(read(pareto)) or ["no mix is farther than a level of its size"]))
    draw(pareto, by_chance, args.out / "pocket-levels.csv", args.out / "images")


if __name__ == "__main__":
    main()
