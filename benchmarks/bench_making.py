"""How fast files are made at the real model's width, beside another checkout and ggml's C code.

    python benchmarks/bench_making.py --other ../old/ideogram4_quant [--layers 8] [--folder DIR]

Writes a synthetic copy in bf16 (K 4608, 12288 and 53248; random weights) and makes each level of
it with ``quantize_checkpoint``, each time in a process of its own, this checkout and the other in
turn: wall and CPU seconds, the peak of memory, and whether the tensors' bytes agree. "Calibrated"
is by importance and error feedback along directions, which older checkouts know too. The other is a
worktree in a folder named ideogram4_quant (git worktree add DIR/ideogram4_quant COMMIT). With
``--check-lengths`` also at a half and at a quarter of the layers: time should follow. The last
table is the encoder alone beside ggml_quantize_chunk in one thread: it needs ggml-python (pip
install ggml-python==0.0.45).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ideogram4_quant.checkpoint.canonical import canonical_shapes
from ideogram4_quant.checkpoint.config import ModelConfig
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.checkpoint.writers import TensorSpec, write_safetensors
from ideogram4_quant.ops.blocks import FORMATS
from ideogram4_quant.ops.chunks import for_each, row_chunks
from ideogram4_quant.quant.calibration_file import write_calibration
from ideogram4_quant.quant.calibration_run import Run
from ideogram4_quant.quant.compiled import prepare
from ideogram4_quant.quant.encodings import Blocks
from ideogram4_quant.quant.layer_stats import LayerStats

try:
    import ggml
except ImportError:
    ggml = None

HERE = Path(__file__).resolve().parents[1]
CALIBRATED = ", calibrated"
LEVELS = ("INT8 W8A8 rotated", "Q8_0", "Q6_K", "Q4_K", f"Q4_K{CALIBRATED}")
_RUN = """
import sys, torch
torch.set_num_threads(int(sys.argv[4]))
from ideogram4_quant.quant.calibration import Calibration
from ideogram4_quant.quant.quantize import quantize_checkpoint
from ideogram4_quant.quant.recipes import QuantOptions
options = QuantOptions(calibration=Calibration.load(sys.argv[5])) if sys.argv[5:] else None
quantize_checkpoint(*sys.argv[1:4], copy="conditional", overwrite=True, options=options)
"""
_TOKENS = 64  # of a calibration that is only to be followed, not to be good


def write_model(path: Path, layers: int) -> None:
    """A conditional copy of ``layers`` layers; every tensor is another run of the same noise."""
    shapes = canonical_shapes(ModelConfig(num_layers=layers))
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def data() -> Iterator[tuple[str, Tensor]]:
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            yield (
                name,
                noise.roll(-12345 * number).repeat(-(-count // len(noise)))[:count].view(shape),
            )

    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    write_safetensors(path, specs, data=data(), overwrite=True)


def write_calibrated(path: Path, source: Path) -> None:
    """Statistics of random inputs for every linear of ``source``, in the older files' version."""
    layers, stats = {}, {}
    for name, raw in open_tensor_files(source).tensors.items():
        if name.startswith("layers.") and len(raw.shape) == 2:
            k = raw.shape[1]
            if k not in stats:
                loud = torch.randn(k, generator=torch.Generator().manual_seed(k)).exp_()
                x = torch.randn(_TOKENS, k, generator=torch.Generator().manual_seed(1)) * loud
                stats[k] = LayerStats.of(x, x[:1])
            layers[f"conditional.{name.removesuffix('.weight')}"] = replace(
                stats[k].spread_over(torch.tensor([1]), 3), shape=tuple(raw.shape)
            )
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    run = Run({"conditional": digest}, "0" * 64, 1, (0,), 3, 256, 256)
    write_calibration(path, layers, (0.2, 0.5, 0.8), (run,), (), overwrite=True)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"version":"3"', b'"version":"2"', 1))


def make(checkout: Path, source: Path, level: str, out: Path, threads: int) -> tuple[float, ...]:
    """(wall s, CPU s, peak MB) of one file made in a new process."""
    where = {**os.environ, "PYTHONPATH": str(checkout.parent)}
    name = level.removesuffix(CALIBRATED)
    command = [sys.executable, "-c", _RUN, str(source), name, str(out), str(threads)]
    if name != level:
        calibration = source.with_suffix(".calibration.safetensors")
        if not calibration.is_file():
            write_calibrated(calibration, source)
        command.append(str(calibration))
    started = time.perf_counter()
    process = subprocess.Popen(command, env=where, cwd=checkout)
    _, state, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if state:
        raise SystemExit(f"{checkout}: {level} failed")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def digests(path: Path) -> dict[str, str]:
    """Tensor -> SHA-256 of its bytes."""
    return {
        name: hashlib.sha256(raw.read().view(torch.uint8).numpy()).hexdigest()
        for name, raw in open_tensor_files(path).tensors.items()
    }


def compare(options: argparse.Namespace, layers: int) -> None:
    """One row a level: seconds here and there, their ratio, memory, bytes."""
    source = options.folder / f"source-{layers}.safetensors"
    write_model(source, layers)
    for level in options.levels:
        suffix = "gguf" if level.removesuffix(CALIBRATED) in FORMATS else "safetensors"
        checkouts = {"here": HERE} | ({"other": options.other} if options.other else {})
        runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in checkouts}
        for _ in range(options.repeats):
            for name, checkout in checkouts.items():
                out = options.folder / f"{name}.{suffix}"
                runs[name].append(make(checkout, source, level, out, options.threads))
        best = {
            name: [median(values) for values in zip(*r, strict=True)] for name, r in runs.items()
        }
        wall, cpu, peak = best["here"]
        shown = f"{layers:6} {level:18}{wall:8.1f}{cpu:8.1f}{peak:8.0f}"
        if options.other:
            other = best["other"]
            same = len({str(digests(options.folder / f"{n}.{suffix}")) for n in checkouts}) == 1
            shown += f"{other[0]:10.1f}{other[1]:8.1f}{other[2]:8.0f}"
            shown += (
                f"{other[0] / wall:9.1f}x{other[1] / cpu:8.1f}x   {'same' if same else 'differ'}"
            )
        print(shown, flush=True)
    for made in options.folder.glob(f"{source.stem}.*"):
        made.unlink()


def beside_ggml(threads: int, repeats: int) -> None:
    """Mweights/s of encoding fp32 rows: ours in ``threads``, ggml's C code in one."""
    shape = (4096, 4608)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    torch.set_num_threads(threads)

    def encode(encoding: Blocks, out: Tensor, chunks: list[slice], at: int) -> None:
        rows = weight[chunks[at]]
        found = encoding.encode_compiled(rows)
        out[chunks[at]] = (found[0] if found else encoding.encode(rows))["weight"]

    for name in ("Q8_0", "Q6_K", "Q4_K"):
        ggml.ggml_quantize_init(FORMATS[name].ggml_type)
        form, encoding = FORMATS[name], Blocks(name, shape)
        out = torch.empty((shape[0], form.row_bytes(shape[1])), dtype=torch.uint8)
        chunks = list(row_chunks(shape))

        def ours(encoding=encoding, out=out, chunks=chunks) -> None:
            for_each(range(len(chunks)), partial(encode, encoding, out, chunks), weight.device)

        def theirs(form=form, out=out) -> None:
            ggml.ggml_quantize_chunk(
                form.ggml_type,
                ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float)),
                ctypes.c_void_p(out.data_ptr()),
                *(0, shape[0], shape[1], None),
            )

        clocks = (time.perf_counter, time.process_time)
        seconds = []  # [turn][ours, theirs][wall, CPU]
        for _ in range(repeats + 1):
            turn = []
            for call in (ours, theirs):
                started = [clock() for clock in clocks]
                call()
                turn.append([clock() - at for clock, at in zip(clocks, started, strict=True)])
            seconds.append(turn)
        warm = seconds[1:]
        rates = [weight.numel() / 1e6 / median(turn[who][0] for turn in warm) for who in (0, 1)]
        wall, cpu = (median(turn[1][c] / turn[0][c] for turn in warm) for c in (0, 1))
        print(f"{name:6}{rates[0]:10.0f}{rates[1]:10.0f}{wall:8.1f}x{cpu:11.1f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="another checkout, a folder ideogram4_quant")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for files of 1 to 9 GB")
    parser.add_argument("--check-lengths", action="store_true")
    parser.add_argument("--ggml-only", action="store_true", help="the last table alone")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    compiled = "compiled" if prepare() else "in torch"
    print(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, {options.threads} thread(s), encoder {compiled}"
    )
    if not options.ggml_only:
        head = f"{'layers':6} {'level':18}{'wall s':>8}{'CPU s':>8}{'MB':>8}"
        head += f"{'other: s':>10}{'CPU s':>8}{'MB':>8}{'wall':>10}{'CPU':>9}   bytes"
        print(head)
        parts = (4, 2, 1) if options.check_lengths else (1,)
        for part in parts:
            compare(options, max(1, options.layers // part))
    if ggml is not None:
        print(f"{'':6}{'Mw/s':>10}{'ggml':>10}{'wall':>9}{'a core':>12}")
        beside_ggml(options.threads, max(5, options.repeats))


if __name__ == "__main__":
    main()
