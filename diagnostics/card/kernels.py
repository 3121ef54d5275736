"""Stages of single kernels: GEMM tiles, row kernels, GGUF decoding, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import attention, blocks, dispatch, prequantized
from .common import device_of, dtype_of, measured, random, short, sizes, timed_rows
from .document import SUMS_ALONE
from .weights import gguf_blocks
from .worker import Context, Row, describe

_FORMATS = ("Q4_K", "Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "Q4_0", "Q3_K", "Q2_K")
_ERROR_TOKENS = 512


def tiles(context: Context) -> Iterator[Row]:
    """Each product of a block by every int8 backend and every tile of the kernel's table."""
    there, dtype = device_of(context), dtype_of(device_of(context))
    m = sizes(context).tokens[0]
    ceiling = context.ceilings.get("int8")
    with torch.inference_mode():
        for name, (n, k) in sizes(context).linears.items():
            if context.late(name):
                continue
            q, weight = (random(shape, there, torch.int8) for shape in ((m, k), (n, k)))
            scales = torch.full((m,), 1e-3, device=there), torch.full((n,), 1e-3, device=there)
            arguments = (q, scales[0], weight, scales[1], None, dtype)
            functions: dict[str, Callable[[], Tensor]] = {
                way: lambda run=run, a=arguments: run(*a)
                for way, run in _products(there, (m, n, k)).items()
            }
            functions[SUMS_ALONE] = lambda a=q, b=weight: torch._int_mm(a, b.t())
            functions |= _whole_linears(random((m, k), there, dtype), weight, scales[1])
            times, failed = measured(functions, context, there)
            about = {"what": name, "m": m, "n": n, "k": k}
            for row in timed_rows(about, times, failed, 2 * m * n * k, "tera a second"):
                if ceiling and "tera a second" in row:
                    row["of_ceiling"] = row["tera a second"] * 1e12 / ceiling
                yield row


def _products(there: torch.device, shape: tuple[int, int, int]) -> dict[str, Callable[..., Tensor]]:
    """The kernel with each tile that its table lists for this device, and the other backends."""
    m, _, k = shape
    ways: dict[str, Callable[..., Tensor]] = {}
    for report in dispatch.reports(there):
        formula = report.name == dispatch.REFERENCE.name and there.type != "cpu"
        if formula or not report.available:
            continue
        backend = dispatch.choose("int8_gemm", shape, there, report.name)
        if "int8_gemm" not in backend.ops:
            continue
        run = backend.get("int8_gemm")
        if report.name == "triton" and there.type == "cuda":
            from ...ops.kernels import launch
            from ...ops.kernels.configs import gemm_candidates

            for config in gemm_candidates(launch.architecture(there), m, k):
                ways[f"triton {config}"] = lambda *a, run=run, c=config: run(*a, config=c)
        else:
            ways[report.name] = run
    return ways


def _whole_linears(x: Tensor, weight: Tensor, scale: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Backends that quantize inside: their time holds that too."""
    shape = (len(x), *weight.shape)
    ways = {}
    for report in dispatch.reports(x.device):
        if report.available and report.name in prequantized.WHOLE_LAYERS_ONLY:
            run = dispatch.choose("int8_linear", shape, x.device, report.name).get("int8_linear")
            ways[f"{report.name}, quantizing too"] = lambda run=run: run(x, weight, scale, None)
    return ways


def rows(context: Context) -> Iterator[Row]:
    """Norms, SwiGLU and rotations to int8, residuals: GB a second of the bytes that must move."""
    there, dtype, size = device_of(context), dtype_of(device_of(context)), sizes(context)
    m = size.tokens[0]
    names = [report.name for report in dispatch.reports(there) if report.available]
    with torch.inference_mode():
        for what, op, k, read, written, make in _row_cases(size, dtype):
            if context.late(what):
                continue
            x, y = (random((m, k), there, dtype, seed) for seed in range(2))
            one = torch.ones(k, device=there, dtype=dtype)
            arguments, functions = make(x, y, one), {}
            for name in names:
                backend = dispatch.choose(op, (m, k, k), there, name)
                if op in backend.ops:
                    run = backend.get(op)
                    functions[name] = lambda run=run, a=arguments: run(*a)
            times, failed = measured(functions, context, there)
            about = {"what": what, "m": m, "k": k}
            yield from timed_rows(
                about, times, failed, m * k * (read + written), "giga bytes a second"
            )


def _row_cases(size, dtype: torch.dtype):
    """(what, op, K, bytes read and written a value, its arguments)."""
    h, f, each = size.hidden, size.feed_forward, dtype.itemsize
    quantize = lambda x, y, one: (x, None, 256)
    yield "rotate to int8", "smooth_rotate_quantize_rows", h, each, 1, quantize
    yield "rotate to int8", "smooth_rotate_quantize_rows", f, each, 1, quantize
    yield "norm to int8", "rmsnorm_scale_quantize_rows", h, each, 1, lambda x, y, one: (
        x, one, one, 1e-5, None, 256,
    )  # fmt: skip
    yield "SwiGLU to int8", "swiglu_quantize_rows", f, 2 * each, 1, lambda x, y, one: (
        x, y, None, 256,
    )  # fmt: skip
    # read and written once, both q and k: K is 18 heads of 256
    if "rms_rope" in dispatch.REFERENCE_OPS:
        yield "q, k: norm and rotary embedding", "rms_rope", h, 2 * each, 2 * each, _heads
    yield "gated residual", "gate_residual_rmsnorm", h, 2 * each, each, lambda x, y, one: (
        x, one, y, one, 1e-5,
    )  # fmt: skip


def _heads(x: Tensor, y: Tensor, one: Tensor) -> tuple:
    """q and k ``[1, L, H, 256]``, their weights, cos and sin ``[1, L, 128]``."""
    q, k = (t.reshape(1, len(t), -1, 256) for t in (x, y))
    angle = x[None, :, :128].float()
    return q, k, one[:256], one[:256], angle.cos(), angle.sin(), 1e-5


def decode(context: Context) -> Iterator[Row]:
    """GGUF blocks to rotated int8 and to floats, beside their bytes at the memory's own rate."""
    there, size = device_of(context), sizes(context)
    dtype = dtype_of(there)
    n, k = size.linears["w1"]
    rate = context.ceilings.get("memory")
    floats = blocks.dequantize
    if "dequantize" in dispatch.REFERENCE_OPS:
        floats = dispatch.choose("dequantize", (n, n, k), there).get("dequantize")
    with torch.inference_mode():
        for qtype in _FORMATS:
            if context.late(qtype):
                continue
            packed = gguf_blocks(qtype, n, k, there)
            op = "dequantize_rotate_quantize"
            run = dispatch.choose(op, (n, n, k), there).get(op)
            outs = {"to int8": (n * k, lambda p=packed, q=qtype, run=run: run(p, q, (n, k), 256))}
            outs["to floats"] = (
                n * k * dtype.itemsize,
                lambda p=packed, q=qtype: floats(p, q, (n, k), dtype),
            )
            for way, (written, function) in outs.items():
                moved = packed.numel() + written
                times, failed = measured({way: function}, context, there, rounds=3)
                about = {"what": qtype, "n": n, "k": k}
                for row in timed_rows(about, times, failed, moved, "giga bytes a second"):
                    if rate and "ms" in row:
                        row["times_the_least"] = row["ms"] / 1e3 * rate / moved
                    yield row


def attend(context: Context) -> Iterator[Row]:
    """Attention at head size 256: every backend of the pack, and each of torch's kernels."""
    there, size = device_of(context), sizes(context)
    dtype = dtype_of(there)
    with torch.inference_mode():
        q, k, v = (random((1, size.heads, _ERROR_TOKENS, 256), there, dtype, s) for s in range(3))
        names = attention.candidates(there)
        try:
            errors = attention.errors(q, k, v, names)
        except Exception as error:  # times are worth having all the same
            errors = {}
            yield {"what": "attention, error", "failed": describe(error)}
        for tokens in size.attention:
            if context.late(f"{tokens} tokens"):
                continue
            shape = (1, size.heads, tokens, 256)
            q, k, v = (random(shape, there, dtype, seed) for seed in range(3))
            functions = {
                name: lambda name=name, a=(q, k, v): attention.BACKENDS[name](*a) for name in names
            }
            if there.type == "cuda":
                functions |= {
                    n: lambda run=run, a=(q, k, v): run(*a) for n, run in _torchs().items()
                }
            times, failed = measured(functions, context, there, rounds=3)
            about = {"what": "attention", "tokens": tokens, "heads": size.heads, "head_size": 256}
            work = 4 * tokens**2 * 256 * size.heads
            for row in timed_rows(about, times, failed, work, "tera a second"):
                error = errors.get(row["way"])
                yield {**row, "dtype": short(dtype), **({} if error is None else {"error": error})}


def _torchs() -> dict[str, Callable[..., Tensor]]:
    """torch's kernels by name; one that cannot take this head size raises when it runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(kind: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    names = {
        "flash": "FLASH_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
        "masked": "EFFICIENT_ATTENTION",
    }
    found = {f"torch {name}": getattr(SDPBackend, kind, None) for name, kind in names.items()}
    return {name: forced(kind) for name, kind in found.items() if kind is not None}
