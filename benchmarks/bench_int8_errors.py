"""What W8A8 loses, weights and activations apart, and how much of it repeats from step to step.

    python benchmarks/bench_int8_errors.py [--work pocket-table] [--prompts 16] [--models clean]

On the pocket model, one ingredient changed at a time. *pictures*: latent SQNR of held-out captions
with the weights exact, this pack's (INT8 rotated, calibrated) or OrbitQuant's, and the activations
exact, in int8 with a scale a token, or on OrbitQuant's 256 unequal levels; in brackets the paired
difference to ours and the half width of its 95 % interval. *inputs*: SQNR of the outputs of the
conditional copy's linears with the inputs alone rounded (four captions, 20 steps). *steps*: the
same for weights and for inputs, and the share of each error's energy that lies in its mean over
the steps. OrbitQuant's rows need it (`pip install -e .[peers]`). About half an hour of a
core for each model.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ideogram4_quant.checkpoint.copy_names import CONDITIONAL
from ideogram4_quant.engine.calibrate import watched
from ideogram4_quant.engine.compare.statistics import student_quantile
from ideogram4_quant.engine.generate import Models
from ideogram4_quant.engine.transformer import canonical_name, load_transformer
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.pocket.table.calibrating import calibration_of
from ideogram4_quant.pocket.table.models import COPIES, VARIANTS, Variant, in_memory, state_of
from ideogram4_quant.pocket.table.painting import Studio, cases_of_part
from ideogram4_quant.pocket.table.peer_inputs import moments_of
from ideogram4_quant.pocket.table.peers import PEERS, Biased
from ideogram4_quant.pocket.table.systems import ROTATION, SCHEMES, is_block_linear, weights

OURS = next(scheme for scheme in SCHEMES if scheme.name == "ours: INT8 rotated, calibrated")
ORBITQUANT = PEERS["OrbitQuant W8A8, GPTQ"]
KINDS = ("qkv", "o", "w1", "w3", "w2")
WATCHED = 4  # captions
_INPUTS = {"inputs, 8 bits": 127, "inputs, 4 bits": 7}
Act = Callable[[Tensor], Tensor]


def turned(x: Tensor, group: int = ROTATION) -> Tensor:
    return rotate(x.contiguous(), group)


def int8(x: Tensor, limit: int = 127, share: float = 1.0) -> Tensor:
    """Rounded to -limit..limit with a scale a token, of a ``share`` of its absmax; the host's own
    are 127 and 1."""
    step = (share * x.abs().amax(-1, keepdim=True) / limit).clamp_min(1e-30)
    return (x / step).round().clamp(-limit, limit) * step


def int8_by_error(x: Tensor) -> Tensor:
    """With that of three scales which loses least of a token."""
    tried = torch.stack([int8(x, share=share) for share in (1.0, 0.9, 0.8)])
    best = (tried - x).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return tried.gather(0, best.expand(1, *x.shape))[0]


def int8_in_groups(x: Tensor) -> Tensor:
    return int8(x.unflatten(-1, (-1, ROTATION))).flatten(-2)


@cache
def _book(size: int):
    from orbitquant.codebooks.lloyd_max import get_codebook

    return get_codebook(size, 8, 2)


def unequal(x: Tensor) -> Tensor:
    """OrbitQuant's: the norm of a token, and 256 levels of a rotated Gaussian."""
    norm = x.norm(dim=-1, keepdim=True)
    return _book(x.shape[-1]).quantize(x / (norm + 1e-10)) * norm


@cache
def _own_turn(size: int):
    from orbitquant.rotations import get_rpbh_rotation

    return get_rpbh_rotation(dim=size, seed=0, block_size="paper")


def orbit_turned(x: Tensor) -> Tensor:
    return _own_turn(x.shape[-1]).apply_to_activations(x)


class Linear(nn.Module):
    """``act(x) W^T``, W [N, K] in the coordinates that ``act`` maps to."""

    def __init__(self, weight: Tensor, act: Act) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) @ self.weight.t()


class Trial:
    """The pocket model with one disease or none, its linears put together from parts."""

    def __init__(self, variant: Variant, work: Path, studio: Studio) -> None:
        self.variant, self.work, self.studio = variant, work, studio
        self.exact = {
            (copy, name.removesuffix(".weight")): tensor.float()
            for copy in COPIES
            for name, tensor in state_of(variant, copy).items()
            if is_block_linear(name)
        }
        calibration = calibration_of(variant, work)
        self.ours = {}
        for copy in COPIES:
            stored = weights(OURS, state_of(variant, copy), copy, calibration)
            for name, weight in stored.items():
                if is_block_linear(name):
                    codes, scale = weight._qdata, weight._params.scale
                    self.ours[copy, name.removesuffix(".weight")] = codes.float() * scale

    @cache  # noqa: B019 (a trial lives as long as the program)
    def orbit(self, key: tuple[str, str]) -> nn.Module:
        moments = moments_of(self.variant, self.work)[".".join(key)]
        return ORBITQUANT.linear(self.exact[key], moments)

    def orbit_weight(self, key: tuple[str, str]) -> Tensor:
        where = {"device": torch.device("cpu"), "dtype": torch.float32}
        return self.orbit(key)._dequantize_weight(**where, remember=False)

    def models(self, make: Callable[[tuple[str, str]], nn.Module] | None = None) -> Models:
        """Both copies, each linear of the blocks made by ``make``; None: as they are."""
        loaded = []
        for copy in COPIES:
            model = load_transformer(
                in_memory(self.variant, state_of(self.variant, copy)), copy, device="cpu"
            )
            for path, module in list(model.named_modules()) if make else ():
                name = canonical_name(f"{path}.weight").removesuffix(".weight")
                if (copy, name) in self.exact:
                    model.set_submodule(path, Biased(make((copy, name)), module.bias))
            loaded.append(model)
        return Models(*loaded, None, self.studio.vae)

    def latents(self, models: Models, prompts: int) -> Tensor:
        return self.studio.paint(models, cases_of_part(0)[:prompts]).trajectories[:, -1].double()


def ingredients(trial: Trial) -> Iterator[tuple[str, Callable[[tuple[str, str]], nn.Module]]]:
    """(weights and activations, how a linear of both is made); ours first."""
    ours, exact = trial.ours, trial.exact
    yield "ours, int8", lambda key: Linear(ours[key], lambda x: int8(turned(x)))
    yield "ours, not rounded", lambda key: Linear(ours[key], turned)
    yield "exact, int8", lambda key: Linear(turned(exact[key]), lambda x: int8(turned(x)))
    if ORBITQUANT.version is None:
        return
    yield "ours, 256 unequal levels", lambda k: Linear(ours[k], lambda x: unequal(turned(x)))
    yield "OrbitQuant's, its own", trial.orbit
    yield "OrbitQuant's, not rounded", lambda k: Linear(trial.orbit_weight(k), orbit_turned)
    yield (
        "OrbitQuant's, int8",
        lambda key: Linear(trial.orbit_weight(key), lambda x: int8(orbit_turned(x))),
    )


def pictures(trial: Trial, prompts: int) -> Iterator[str]:
    true, first = trial.latents(trial.models(), prompts), None
    signal = true.square().flatten(1).sum(1)
    for name, make in ingredients(trial):
        found = trial.latents(trial.models(make), prompts)
        db = 10 * torch.log10(signal / (found - true).square().flatten(1).sum(1))
        first = db if first is None else first
        off = db - first
        half = student_quantile(prompts - 1) * off.std().item() / math.sqrt(prompts)
        yield f"  {name:28} {db.mean():5.1f} dB ({off.mean():+.1f} +- {half:.1f})"


def rounded_inputs() -> dict[str, tuple[Act, Act]]:
    """What rounds the inputs -> (how inputs and weights are turned before it, what rounds)."""
    found: dict[str, tuple[Act, Act]] = {
        "int8, a scale a token": (turned, int8),
        "int8, best of three scales": (turned, int8_by_error),
        f"int8, a scale for each {ROTATION}": (turned, int8_in_groups),
        "int8, rotated in groups of 64": (partial(turned, group=64), int8),
        "int8, not rotated": (lambda x: x, int8),
    }
    if ORBITQUANT.version is not None:
        found["256 unequal levels"] = (turned, unequal)
        found["int8, OrbitQuant's rotation"] = (orbit_turned, int8)
        found["OrbitQuant's quantizer"] = (orbit_turned, unequal)
    return found


def watch(trial: Trial, look: Callable[[str, Tensor], None]) -> None:
    """``look`` (linear, its inputs) at every call of the conditional copy's block linears."""
    models = trial.models()
    for name, module in watched(models).items():
        copy, _, own = name.partition(".")
        if copy == CONDITIONAL and (copy, own) in trial.exact and own.endswith(KINDS):
            module.register_forward_pre_hook(lambda _, args, own=own: look(own, args[0].float()))
    trial.latents(models, WATCHED)


def by_kind(values: dict[str, float]) -> str:
    kinds = {kind: [v for name, v in values.items() if name.endswith(f".{kind}")] for kind in KINDS}
    return " ".join(f"{kind} {sum(found) / len(found):5.2f}" for kind, found in kinds.items())


def db_of(signal: dict[str, float], noise: dict[str, float]) -> dict[str, float]:
    return {name: 10 * math.log10(signal[name] / noise[name]) for name in signal}


def inputs(trial: Trial) -> Iterator[str]:
    ways = rounded_inputs()
    signal, noise = defaultdict(float), {way: defaultdict(float) for way in ways}

    def look(name: str, x: Tensor) -> None:
        weight = trial.exact[CONDITIONAL, name]
        signal[name] += (x @ weight.t()).double().square().sum().item()
        for way, (turn, act) in ways.items():
            error = (act(turn(x)) - turn(x)) @ turn(weight).t()
            noise[way][name] += error.double().square().sum().item()

    watch(trial, look)
    for way in ways:
        yield f"  {way:30} {by_kind(db_of(signal, noise[way]))}"


def steps(trial: Trial) -> Iterator[str]:
    count = len(trial.studio.steps)
    energy = {what: defaultdict(float) for what in ("outputs", "weights", *_INPUTS)}
    of_mean = {what: defaultdict(float) for what in energy}
    sums: dict[tuple[str, str], Tensor] = {}
    calls: dict[str, int] = defaultdict(int)

    def look(name: str, x: Tensor) -> None:
        true, stored = turned(trial.exact[CONDITIONAL, name]), trial.ours[CONDITIONAL, name]
        x = turned(x)
        calls[name] += 1
        found = {
            "outputs": x @ true.t(),
            "weights": x @ (stored - true).t(),
        }
        for what, limit in _INPUTS.items():
            found[what] = (int8(x, limit) - x) @ true.t()
        for what, each in found.items():
            energy[what][name] += each.double().square().sum().item()
            sums[what, name] = each if (what, name) not in sums else sums[what, name] + each
            if calls[name] % count == 0:  # a batch of captions is through
                mean = sums.pop((what, name)) / count
                of_mean[what][name] += mean.double().square().sum().item() * count

    watch(trial, look)
    for what in ("weights", *_INPUTS):
        share = {name: of_mean[what][name] / energy[what][name] for name in energy[what]}
        yield f"  {what}: SQNR       {by_kind(db_of(energy['outputs'], energy[what]))}"
        yield f"  {what}: share      {by_kind(share)}"
        yield f"  {what}: of means   {by_kind(db_of(of_mean['outputs'], of_mean[what]))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    there = {v.name: v for v in VARIANTS if not v.stress}
    parser.add_argument("--work", type=Path, default=Path("pocket-table"), metavar="DIR")
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--models", nargs="+", choices=there, default=list(there), metavar="M")
    parser.add_argument(
        "--parts", nargs="+", choices=("pictures", "inputs", "steps"), metavar="PART",
        default=["pictures", "inputs", "steps"],
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("ORBITQUANT_KERNELS_AUTOFETCH", "0")  # its reference path needs none
    studio = Studio()
    with torch.inference_mode():
        for name in options.models:
            trial = Trial(there[name], options.work, studio)
            made = {
                "pictures": lambda trial=trial: pictures(trial, options.prompts),
                "inputs": lambda trial=trial: inputs(trial),
                "steps": lambda trial=trial: steps(trial),
            }
            for part in options.parts:
                print(f"{name}, {part}:")
                for line in made[part]():
                    print(line, flush=True)


if __name__ == "__main__":
    main()
