"""What calibrated rounding costs at the real model's widths: time, and the most memory it takes.

    python benchmarks/bench_real_width.py [--threads 1] [--columns 4608 12288] [--levels INT8]

Each width runs in a process of its own. *watching* is a calibration's sums of one call of a linear,
as a multiple of that linear's product in fp32; *root* prepares the inputs' moments of one linear;
*rows* rounds as many rows of it as the writer does at a time, as a multiple of rounding them to
nearest. Inputs are made up, weights random. Seconds are a core's, so that other work on the machine
counts little. The last lines are a whole copy at these rates, its 204 block linears: computed, not
measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from ideogram4_quant.checkpoint.canonical import canonical_shapes, is_linear
from ideogram4_quant.checkpoint.config import ModelConfig
from ideogram4_quant.ops.chunks import FED_BACK, row_chunks
from ideogram4_quant.quant.encodings import Encoding
from ideogram4_quant.quant.input_moments import InputMoments, block_sums, input_moments, sketch
from ideogram4_quant.quant.storage import STORAGES, storage_encoding

TOKENS = 1024
OUTPUTS = 1024  # of the product that watching is compared with
LEVELS = ("INT8", "W6A8 g16", "W4A8 g16", "W4A4", "Q4_K")


@dataclass(frozen=True)
class Cost:
    """Of one width: core-seconds, gigabytes, and of each encoding (root, plain, calibrated)
    core-seconds, the last two a row."""

    columns: int
    rows: int  # of a weight, at a time
    watching: float  # times the product with as many outputs as inputs
    held: float  # by a calibration, of one linear
    idle: float
    peak: float
    rounding: dict[str, tuple[float, float, float]]


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def resident() -> float:
    """The most memory this process has had, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def inputs(columns: int) -> torch.Tensor:
    """[TOKENS, columns], correlated, some loud."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(TOKENS, 32, generator=generator)
    x = shared @ torch.randn(32, columns, generator=generator) / 4
    x += torch.randn(TOKENS, columns, generator=generator)
    return x * torch.randn(columns, generator=generator).exp()


def watch(x: torch.Tensor) -> InputMoments:
    """What a calibration sums of a call."""
    return input_moments(x.double().square().sum(0), sketch(x), len(x), block_sums(x))


def measure(columns: int, threads: int, levels: list[str]) -> Cost:
    """The costs of one width."""
    torch.set_num_threads(threads)
    idle = resident()
    x = inputs(columns)
    other = torch.randn(OUTPUTS, columns)
    watch(x[:64])  # signs are drawn once
    product = min(seconds(lambda: x @ other.t()) for _ in range(3)) * columns / OUTPUTS
    watching = min(seconds(lambda: (block_sums(x), sketch(x), x.square().sum(0))) for _ in range(3))
    moments = watch(x)
    rows = next(row_chunks((columns, columns), values=FED_BACK)).stop
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    found = {name: rounding(encoding(name, columns), weight, moments) for name in levels}
    sums = moments.square, moments.directions, moments.blocks
    held = sum(each.nbytes for each in sums) / 1e9
    return Cost(columns, rows, watching / product, held, idle, resident(), found)


def encoding(name: str, columns: int) -> Encoding:
    container = next(c for c, names in STORAGES.items() if name in names)
    return storage_encoding(name, container, (columns, columns))


def rounding(
    plain: Encoding, weight: torch.Tensor, moments: InputMoments
) -> tuple[float, float, float]:
    """Seconds: of what all rows share, of a row to nearest, of a row with feedback."""
    started = time.process_time()
    led = plain.led_by(moments, feedback=True)
    root = time.process_time() - started
    with torch.inference_mode():
        nearest, fed_back = (seconds(lambda e=e: e.encode(weight)) for e in (plain, led))
    return root, nearest / len(weight), fed_back / len(weight)


def shown(cost: Cost) -> str:
    lines = [
        f"{cost.columns} inputs: watching {cost.watching:.2f} x a product with as many outputs; at "
        f"most {cost.peak:.1f} GB, of which {cost.idle:.1f} GB before it began"
    ]
    for name, (root, plain, led) in cost.rounding.items():
        lines.append(
            f"  {name:9} root {root:6.1f} s, rows {led / plain:5.1f} x nearest, "
            f"{1000 * led:5.1f} ms each ({cost.rows} at a time)"
        )
    return "\n".join(lines)


def whole_copy(costs: dict[int, Cost]) -> list[str]:
    """Lines for a whole copy, from the rates of the widths that were measured."""
    shapes = canonical_shapes(ModelConfig()).items()
    linears = [s for name, s in shapes if is_linear(name) and name.startswith("layers.")]
    known = [shape for shape in linears if shape[1] in costs]
    share = sum(map(prod, known)) / sum(map(prod, linears))
    watching = sum(costs[k].watching * k * k for _, k in known) / sum(map(prod, known))
    lines = [
        f"a copy, modelled ({share:.1%} of its weights have these widths):",
        f"  calibrating takes {1 + watching:.2f} x the products of the pictures it samples",
        f"  and holds {sum(costs[k].held for _, k in known):.1f} GB of sums",
    ]
    for name in next(iter(costs.values())).rounding:
        plain = led = roots = 0.0
        for n, k in known:
            root, each, calibrated = costs[k].rounding[name]
            plain += n * each
            led += n * calibrated
            roots += root
        lines.append(
            f"  {name:9} {(roots + led) / plain:5.1f} x nearest: {(roots + led) / 3600:.1f} "
            f"core-hours here, {roots / 3600:.1f} of them roots"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--columns", type=int, nargs="+", default=[4608, 12288])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    options = parser.parse_args()
    costs = {}
    for columns in options.columns:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            how = (columns, options.threads, options.levels)
            costs[columns] = pool.apply(measure, how)
        print(shown(costs[columns]), flush=True)
    print("\n".join(whole_copy(costs)))


if __name__ == "__main__":
    main()
