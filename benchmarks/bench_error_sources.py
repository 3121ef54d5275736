"""Where the error of a picture comes from: each kind of linear in each copy, quantized alone.

    python benchmarks/bench_error_sources.py --out docs [--work pocket-table] [--prompts 32]

On the pocket model, with Q4_K calibrated: the linears of one kind in one copy are quantized, all
else stays exact; sampled with the default preset at a constant guidance of 7 and of 3. The error is
the SQNR of the final latents, its mean over held-out captions with a 95 % interval: in dB, as at
guidance 3 a caption here and there goes over to another picture, which would be most of a mean of
energies. A share is 10^(-dB / 10) over the sum of all kinds and both copies. Writes
``error-sources.csv`` and ``images/error-sources.png``. Also, without a picture: how many directions
the difference between the two copies takes, by kind. About twelve CPU minutes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ideogram4_quant.engine.compare.statistics import Interval, mean_interval
from ideogram4_quant.engine.generate import GenerateRequest, Models, initial_noise, sample
from ideogram4_quant.engine.transformer import load_transformer, prepare
from ideogram4_quant.pocket.data import HEIGHT, HELD_OUT, WIDTH
from ideogram4_quant.pocket.table.calibrating import calibration_of
from ideogram4_quant.pocket.table.models import COPIES, VARIANTS, in_memory, state_of
from ideogram4_quant.pocket.table.painting import PRESET, Studio
from ideogram4_quant.pocket.table.systems import SCHEMES, is_block_linear, weights
from ideogram4_quant.sampling import grid_size

CLEAN = VARIANTS[0]
SCHEME = next(scheme for scheme in SCHEMES if scheme.name == "ours: Q4_K, calibrated")
KINDS = ("feed_forward.w2", "feed_forward.w1", "feed_forward.w3", "attention.o", "attention.qkv",
         "adaln_modulation")  # fmt: skip
GUIDANCES = (7.0, 3.0)
ALL = "all linears"
BOTH = "both copies"


class Sampler:
    """Final latents of the captions, by the linears that are quantized."""

    def __init__(self, work: Path, prompts: int) -> None:
        calibration = calibration_of(CLEAN, work)
        self.exact = {copy: state_of(CLEAN, copy) for copy in COPIES}
        self.quantized = {
            copy: weights(SCHEME, self.exact[copy], copy, calibration) for copy in COPIES
        }
        studio = Studio()
        cases = HELD_OUT[:prompts]
        self.features = [studio.features[case.caption] for case in cases]
        self.seeds = [case.seed for case in cases]
        self.whole = {copy: self.model(copy, None) for copy in COPIES}

    def model(self, copy: str, kind: str | None):
        """One copy with the linears of ``kind`` quantized: one, :data:`ALL` or None."""
        tensors = dict(self.exact[copy])
        for name in tensors:
            ours = is_block_linear(name) and kind is not None
            if ours and (kind == ALL or f".{kind}." in name):
                tensors[name] = self.quantized[copy][name].dequantize()
        return load_transformer(
            in_memory(CLEAN, tensors), copy, device="cpu", dtype=torch.float32
        ).eval()

    def latents(self, models: Mapping[str, object], guidance: float) -> Tensor:
        """[prompts, tokens, channels], captions of one length at once."""
        both = Models(models["conditional"], models["unconditional"], None, None)
        steps = GenerateRequest("", WIDTH, HEIGHT, preset=PRESET, guidance=guidance).plan()
        rows, columns = grid_size(WIDTH, HEIGHT)
        unconditional = prepare(both.unconditional, rows, columns)
        found = [None] * len(self.seeds)
        by_length: dict[int, list[int]] = {}
        for i, features in enumerate(self.features):
            by_length.setdefault(len(features), []).append(i)
        for batch in by_length.values():
            features = torch.stack([self.features[i] for i in batch])
            conditional = prepare(both.conditional, rows, columns, features)
            channels = both.conditional.config.in_channels
            noise = [initial_noise(self.seeds[i], rows * columns, channels) for i in batch]
            *_, (_, x) = sample(both, steps, torch.cat(noise), conditional, unconditional)
            for i, latent in zip(batch, x, strict=True):
                found[i] = latent
        return torch.stack(found)


def runs() -> Iterator[tuple[str, str]]:
    """(copy, kind) of every run: each kind alone, whole copies, and both."""
    for copy in COPIES:
        yield from ((copy, kind) for kind in (*KINDS, ALL))
    yield BOTH, ALL


def measured(sampler: Sampler) -> dict[tuple[float, str, str], Interval]:
    """(guidance, copy, kind) -> latent SQNR of the final latents in dB."""
    truth = {g: sampler.latents(sampler.whole, g) for g in GUIDANCES}
    found = {}
    for copy, kind in runs():
        names = COPIES if copy == BOTH else (copy,)
        models = sampler.whole | {name: sampler.model(name, kind) for name in names}
        for g in GUIDANCES:
            noise = (sampler.latents(models, g) - truth[g]).double().square().sum((1, 2))
            ratio = truth[g].double().square().sum((1, 2)) / noise
            decibels = (10 * ratio.log10()).tolist()
            found[g, copy, kind] = mean_interval(decibels)
            worst = min(decibels)
            print(
                f"{g:g}  {copy:14} {kind:18} {found[g, copy, kind].mean:5.1f}  {worst:5.1f}",
                flush=True,
            )
    return found


def shares(found: Mapping[tuple[float, str, str], Interval], guidance: float) -> dict:
    """(copy, kind) -> part of the summed error of all kinds and both copies."""
    alone = {(c, k): 10 ** (-found[guidance, c, k].mean / 10) for c in COPIES for k in KINDS}
    return {key: value / sum(alone.values()) for key, value in alone.items()}


def directions(exact: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[float, float, float]]:
    """kind -> (|difference| / |conditional|, rank of 90 % of its energy and of the weight's own),
    ranks as parts of the full one; means over layers."""
    found = {}
    for kind in KINDS:
        rows = []
        for name, weight in exact["conditional"].items():
            if is_block_linear(name) and f".{kind}." in name:
                w = weight.float()
                d = exact["unconditional"][name].float() - w
                rows.append((float(d.norm() / w.norm()), _rank(d), _rank(w)))
        found[kind] = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    return found


def _rank(matrix: Tensor, part: float = 0.9) -> float:
    energy = torch.linalg.svdvals(matrix).square()
    count = int((energy.cumsum(0) < part * energy.sum()).sum()) + 1
    return count / len(energy)


def write_csv(found: Mapping[tuple[float, str, str], Interval], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("guidance", "copy", "quantized", "dB", "low", "high", "prompts", "share"))
        for (g, copy, kind), of in found.items():
            share = shares(found, g).get((copy, kind))
            part = "" if share is None else f"{share:.4f}"
            figures = (f"{x:.2f}" for x in (of.mean, of.low, of.high))
            out.writerow((f"{g:g}", copy, kind, *figures, of.n, part))


def plot(found: Mapping[tuple[float, str, str], Interval], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GUIDANCES), figsize=(10, 3.6), sharex=True, sharey=True)
    for panel, g in zip(panels, GUIDANCES, strict=True):
        part = shares(found, g)
        for offset, (copy, colour) in zip(
            (-0.2, 0.2), (("conditional", "#2b6cb0"), ("unconditional", "#dd6b20")), strict=True
        ):
            values = [100 * part[copy, kind] for kind in KINDS]
            places = [i + offset for i in range(len(KINDS))]
            bars = panel.barh(places, values, 0.38, label=copy, color=colour)
            panel.bar_label(
                bars, [f"{v:.1f}" if v >= 0.1 else f"{v:.2f}" for v in values], padding=3
            )
        panel.set_title(f"guidance {g:g}")
        panel.set_xlabel("% of the error, quantized alone")
        panel.set_yticks(range(len(KINDS)), [kind.rpartition(".")[2] for kind in KINDS])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].set_xlim(0, 100 * max(max(shares(found, g).values()) for g in GUIDANCES) * 1.18)
    panels[-1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("pocket-table"), metavar="DIR")
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sampler = Sampler(args.work, args.prompts)
    for kind, (size, rank, own) in directions(sampler.exact).items():
        ranks = f"rank {rank:.0%}, the weight's {own:.0%}"
        print(f"{kind:18} difference {size:.2f} of the weight, {ranks}")
    found = measured(sampler)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(found, args.out / "error-sources.csv")
    plot(found, args.out / "images" / "error-sources.png")


if __name__ == "__main__":
    main()
