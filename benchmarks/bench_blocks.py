"""Decoding and encoding rates of the GGUF block formats, beside gguf-py's and ggml's.

    python benchmarks/bench_blocks.py [--threads 1 2] [--rows 2048] [--columns 4608] [--types Q4_K]

Mweights/s, the best of several runs side by side; the ratio is the median of those of neighbouring
runs, with the smallest and the largest. Both sides have as many threads as the head of a table
says: ggml's C code, which has none of its own here, encodes the rows in that many parts at once;
gguf-py alone decodes with one always. With one thread the clock is the CPU time of the process, so
that other work on the machine counts less; with more it is the wall clock: leave the machine alone.
The RMSE is of this encoder over ggml's, with importance the weighted one; error feedback (after
importance, 16 directions) spends it on the error of outputs, see bench_importance.py. ggml's Q8_0
knows no importance. ggml's columns need ggml-python (pip install ggml-python==0.0.45).
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import gguf
import numpy as np
import torch
from gguf.quants import dequantize as gguf_dequantize

from ideogram4_quant.ops.blocks import FORMATS, BlockFormat, dequantize, quantize
from ideogram4_quant.ops.feedback import Feedback

try:
    import ggml
except ImportError:
    ggml = None

PACKED = {fmt.name: fmt for fmt in FORMATS.values() if fmt.block_size > 1}
REPEATS = {"decode": 9, "encode": 5}


def timed(
    clock: Callable[[], float], repeats: int, *candidates: Callable[[], object]
) -> list[list[float]]:
    """Seconds of each run of each candidate, after one that does not count.

    They take turns, so that they share the machine's moods.
    """
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(repeats + 1):
        for number, candidate in enumerate(candidates):
            started = clock()
            candidate()
            if turn:
                seconds[number].append(clock() - started)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Median, smallest and largest of how many times faster ours is, turn by turn."""
    found = [their / our for their, our in zip(theirs, ours, strict=True)]
    return f"{median(found):7.2f}x ({min(found):.2f} to {max(found):.2f})"


def decoding(formats: list[BlockFormat], weight: torch.Tensor, clock: Callable[[], float]) -> None:
    print(f"{'decode':8}{'gguf-py':>10}{'float32':>10}{'bfloat16':>10}   ratio of float32")
    millions = weight.numel() / 1e6
    for fmt in formats:
        data = quantize(weight[:64], fmt.name).repeat(len(weight) // 64, 1)
        array, kind = data.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type)
        theirs, ours, low = timed(
            clock,
            REPEATS["decode"],
            lambda array=array, kind=kind: gguf_dequantize(array, kind),
            lambda data=data, fmt=fmt: dequantize(data, fmt.name, weight.shape),
            lambda data=data, fmt=fmt: dequantize(data, fmt.name, weight.shape, torch.bfloat16),
        )
        rates = "".join(f"{millions / min(each):10.0f}" for each in (theirs, ours, low))
        print(f"{fmt.name:8}{rates} {ratio(theirs, ours)}", flush=True)


def ggml_encoder(fmt: BlockFormat, weight: torch.Tensor, column: torch.Tensor | None, threads: int):
    """A call that encodes ``weight`` with ggml's C code, a share of the rows in each thread."""
    floats = ctypes.POINTER(ctypes.c_float)
    source = weight.numpy()
    rows, columns = source.shape
    out = np.empty((rows, fmt.row_bytes(columns)), dtype=np.uint8)
    share = -(-rows // threads)
    pool = ThreadPoolExecutor(threads)  # ctypes lets go of Python's lock during the call
    ggml.ggml_quantize_init(fmt.ggml_type)  # its tables, before several threads ask for them

    def part(first: int) -> None:
        ggml.ggml_quantize_chunk(
            fmt.ggml_type,
            source.ctypes.data_as(floats),
            out.ctypes.data_as(ctypes.c_void_p),
            first * columns,
            min(share, rows - first),
            columns,
            None if column is None else column.numpy().ctypes.data_as(floats),
        )

    def encode() -> None:
        if threads == 1:
            part(0)
        else:
            list(pool.map(part, range(0, rows, share)))

    encode.out = out
    return encode


def rms_error(fmt: BlockFormat, data: torch.Tensor, weight: torch.Tensor, column) -> float:
    squares = (dequantize(data, fmt.name, weight.shape) - weight).double().square()
    return float((squares if column is None else squares * column).mean().sqrt())


def encoding(formats: list[BlockFormat], weight: torch.Tensor, clock: Callable[[], float]) -> None:
    print(f"\n{'encode':18}{'ggml':>10}{'here':>10}{'RMSE':>9}{'equal':>10}   ratio")
    millions = weight.numel() / 1e6
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(weight.shape[1], generator=generator)
    directions = torch.randn(weight.shape[1], 16, generator=generator) * importance.sqrt()[:, None]
    led = {"feedback": Feedback(importance, directions / 8)}
    for fmt in formats:
        variants = [("", None, {}), (" importance", importance, {}), (" feedback", importance, led)]
        if fmt.name.endswith("_K") and fmt.knows_ggml:
            variants.append((" as ggml", None, {"as_ggml": True}))
        for variant, column, options in variants:
            name = fmt.name + variant
            ours = partial(quantize, weight, fmt.name, column, **options)
            if ggml is None:
                (seconds,) = timed(clock, REPEATS["encode"], ours)
                print(f"{name:18}{'-':>10}{millions / min(seconds):10.1f}", flush=True)
                continue
            theirs = ggml_encoder(fmt, weight, column, torch.get_num_threads())
            reference, seconds = timed(clock, REPEATS["encode"], theirs, ours)
            data, want = ours(), torch.from_numpy(theirs.out)
            equal = (data.view(-1, fmt.type_size) == want.view(-1, fmt.type_size)).all(1)
            error = rms_error(fmt, data, weight, column) / rms_error(fmt, want, weight, column)
            rates = f"{millions / min(reference):10.1f}{millions / min(seconds):10.1f}"
            print(
                f"{name:18}{rates}{error:9.4f}{equal.float().mean():10.2%} "
                f"{ratio(reference, seconds)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a table each")
    parser.add_argument("--rows", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--columns", type=int, default=4608, help="a multiple of 256")
    parser.add_argument("--types", nargs="+", choices=PACKED, default=list(PACKED))
    parser.add_argument("--only", choices=("decode", "encode"))
    options = parser.parse_args()
    formats = [PACKED[name] for name in options.types]
    weight = torch.randn(
        options.rows, options.columns, generator=torch.Generator().manual_seed(0)
    ).mul_(0.02)
    for threads in options.threads:
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        print(
            f"\n{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch "
            f"{torch.__version__}, {threads} against {threads} thread(s), {clock.__name__}, "
            f"[{options.rows}, {options.columns}], Mweights/s"
        )
        if options.only != "encode":
            decoding(formats, weight, clock)
        if options.only != "decode":
            encoding(formats, weight, clock)


if __name__ == "__main__":
    main()
