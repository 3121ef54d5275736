"""Decoding and encoding rates of the GGUF block formats, beside gguf-py's and ggml's.

    python benchmarks/bench_blocks.py [--threads 1] [--rows 2048] [--columns 4608] [--types Q4_K]

Mweights/s, the best of several runs side by side. With one thread the clock is the CPU time of the
process, so that other work on the machine counts less; with more it is the wall clock. gguf-py
decodes with one thread; ggml's C code, which has no threads of its own here, encodes the rows in
as many parts at once as there are threads. The RMSE is of this encoder over ggml's, with
importance the weighted one; error feedback (after importance, 16 directions) spends it on the error
of outputs, see bench_importance.py. ggml's Q8_0 knows no importance. ggml's columns need
ggml-python (pip install ggml-python==0.0.45).
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
REPEATS = {"decode": 7, "encode": 3}


def best(
    clock: Callable[[], float], repeats: int, *candidates: Callable[[], object]
) -> list[float]:
    """Least seconds of each candidate; they take turns, so that they share the machine's moods."""
    seconds = [float("inf")] * len(candidates)
    for _ in range(repeats):
        for number, candidate in enumerate(candidates):
            started = clock()
            candidate()
            seconds[number] = min(seconds[number], clock() - started)
    return seconds


def decoding(formats: list[BlockFormat], weight: torch.Tensor, clock: Callable[[], float]) -> None:
    print(f"{'decode':8}{'gguf-py':>10}{'float32':>10}{'ratio':>8}{'bfloat16':>10}")
    millions = weight.numel() / 1e6
    for fmt in formats:
        data = quantize(weight[:64], fmt.name).repeat(len(weight) // 64, 1)
        array, kind = data.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type)
        theirs, ours, low = best(
            clock,
            REPEATS["decode"],
            lambda array=array, kind=kind: gguf_dequantize(array, kind),
            lambda data=data, fmt=fmt: dequantize(data, fmt.name, weight.shape),
            lambda data=data, fmt=fmt: dequantize(data, fmt.name, weight.shape, torch.bfloat16),
        )
        rates = f"{millions / theirs:10.0f}{millions / ours:10.0f}{theirs / ours:7.2f}x"
        print(f"{fmt.name:8}{rates}{millions / low:10.0f}", flush=True)


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
    print(f"\n{'encode':18}{'ggml':>10}{'here':>10}{'ratio':>8}{'RMSE':>9}   equal blocks")
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
                (seconds,) = best(clock, REPEATS["encode"], ours)
                print(f"{name:18}{'-':>10}{millions / seconds:10.1f}", flush=True)
                continue
            theirs = ggml_encoder(fmt, weight, column, torch.get_num_threads())
            reference, seconds = best(clock, REPEATS["encode"], theirs, ours)
            data, want = ours(), torch.from_numpy(theirs.out)
            equal = (data.view(-1, fmt.type_size) == want.view(-1, fmt.type_size)).all(1)
            error = rms_error(fmt, data, weight, column) / rms_error(fmt, want, weight, column)
            rates = f"{millions / reference:10.1f}{millions / seconds:10.1f}"
            print(
                f"{name:18}{rates}{reference / seconds:7.2f}x{error:9.4f}"
                f"{equal.float().mean():12.2%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--columns", type=int, default=4608, help="a multiple of 256")
    parser.add_argument("--types", nargs="+", choices=PACKED, default=list(PACKED))
    parser.add_argument("--only", choices=("decode", "encode"))
    options = parser.parse_args()
    formats = [PACKED[name] for name in options.types]
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    weight = torch.randn(
        options.rows, options.columns, generator=torch.Generator().manual_seed(0)
    ).mul_(0.02)
    print(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, {options.threads} thread(s), {clock.__name__}, "
        f"[{options.rows}, {options.columns}], Mweights/s"
    )
    if options.only != "encode":
        decoding(formats, weight, clock)
    if options.only != "decode":
        encoding(formats, weight, clock)


if __name__ == "__main__":
    main()
