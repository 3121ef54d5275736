"""What a calibration costs: rates of encoding a linear at each level, without one and with.

    python benchmarks/bench_encode.py [--threads 2] [--rows 1024] [--columns 4608] [--levels Q4_K]

Mweights/s on the wall clock, the median of several runs side by side, of what ``quantize`` does
with each weight in bf16: encode, decode, measure the error. With a calibration, beside the time of
the plain one: rounded to nearest (GGUF types search their scales by importance), and with error
feedback, the default. The last column is the time of a copy's 9.3 billion weights at that rate:
computed, not measured.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial

import torch
from torch import Tensor

from ideogram4_quant.ops.tuning.timing import medians
from ideogram4_quant.quant.encode import encode_tensor
from ideogram4_quant.quant.encodings import Blocks, Encoding, NativeInt8
from ideogram4_quant.quant.input_moments import DIRECTIONS, InputMoments, input_moments, sketch
from ideogram4_quant.quant.plan import TensorPlan

ROTATION = 256
COPY_WEIGHTS = 9.3e9
REPEATS = 3
TOKENS = 4096
NAME = "layers.0.feed_forward.w1.weight"


def encodings(shape: tuple[int, int]) -> dict[str, Encoding]:
    """Level -> how it stores a linear of this shape."""
    int8 = {"INT8": NativeInt8(), "INT8 rotated": NativeInt8(ROTATION)}
    return int8 | {name: Blocks(name, shape) for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K")}


def inputs(columns: int) -> InputMoments:
    """Of inputs with loud channels that are loud together, as a calibration finds them."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(TOKENS, 2 * DIRECTIONS, generator=generator)
    mixing = torch.randn(2 * DIRECTIONS, columns, generator=generator)
    loudness = torch.randn(columns, generator=generator).exp()
    x = (shared @ mixing / 4 + torch.randn(TOKENS, columns, generator=generator)) * loudness
    return input_moments(x.double().square().sum(0), sketch(x), TOKENS)


def row(level: str, encoding: Encoding, weight: Tensor, moments: InputMoments) -> str:
    """The level's rates, and how much longer each kind of calibrated rounding takes."""

    def run(inputs: InputMoments | None, feedback: bool) -> None:
        plan = TensorPlan(
            "conditional", NAME, tuple(weight.shape), encoding, linear=True, quantized=True,
            inputs=inputs, feedback=feedback,
        )  # fmt: skip
        encode_tensor(plan, weight)

    kinds = {"plain": (None, False), "nearest": (moments, False), "feedback": (moments, True)}
    seconds = medians(
        {kind: partial(run, *how) for kind, how in kinds.items()}, torch.device("cpu"), REPEATS
    )
    plain, nearest, fed_back = seconds.values()
    millions = weight.numel() / 1e6
    shown = f"{level:14}{millions / plain:10.1f}"
    shown += "".join(f"{millions / s:12.1f}{s / plain:7.1f}x" for s in (nearest, fed_back))
    return f"{shown}{COPY_WEIGHTS * fed_back / weight.numel() / 60:14.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4608, help="a multiple of 256")
    parser.add_argument("--levels", nargs="+", choices=encodings((1, ROTATION)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (options.rows, options.columns)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    print(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, {options.threads} thread(s), {list(shape)}, Mweights/s"
    )
    kinds = "".join(f"{kind:>12}{'time':>8}" for kind in ("nearest", "feedback"))
    print(f"{'level':14}{'plain':>10}{kinds}{'min a copy':>14}")
    moments = inputs(options.columns)
    for level, encoding in encodings(shape).items():
        if options.levels is None or level in options.levels:
            print(row(level, encoding, weight, moments), flush=True)


if __name__ == "__main__":
    main()
