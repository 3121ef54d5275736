"""``ideogram4-quant selftest``: every backend of this device against the torch formulas.

The formulas run on the CPU, so a device that computes wrongly cannot agree with itself. First come
the shapes of real work (``selftest_shapes``), then every kind of linear at small and odd ones. On a
GPU the first run compiles some eighty kernels; what the time leaves out is reported as not run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention, blocks, dispatch, reference
from ..ops.linear import LinearOptions, gguf_linear, int8_linear, linear
from . import selftest_shapes
from .selftest_shapes import DTYPES, EPS, Check, randn, there

SECONDS = 180.0
OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"

# The largest relative error of outputs, beside the rounding of the dtype.
_SAME_ROWS = 2e-3  # some int8 values of the activations may round the other way
_EXACT = 1e-6
_DENSE = 2e-3
_ATTENTION = {attention.SDPA: 5e-3, attention.INT8: 5e-2}
_K, _N, _M = 768, 200, 33
_PACKED = (("W4A8", {}), ("W4A8", {"bits": 6}), ("W4A4", {}))


@dataclass(frozen=True)
class Result:
    """One line: what ran where, its error and the error allowed; ``note`` says what failed."""

    check: str
    backend: str
    status: str
    error: float | None = None
    allowed: float | None = None
    note: str = ""


def run(args: argparse.Namespace) -> int:
    """Check, print, and return 1 if a check failed."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    missing = [
        r for r in (*dispatch.reports(device), *attention.reports(device)) if not r.available
    ]
    results = []
    if not args.json:
        print(f"torch {torch.__version__} on {device}")
        for report in missing:
            print(f"{'not there':<10} {report.name}: {report.reason}")
    for result in selftest(device):
        results.append(result)
        if not args.json:
            print(_line(result), flush=True)
    counts = {status: sum(r.status == status for r in results) for status in (OK, FAILED, NOT_RUN)}
    if args.json:
        document = {
            "device": str(device),
            "results": [asdict(result) for result in results],
            "missing": [asdict(report) for report in missing],
        }
        print(json.dumps(document, indent=1))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts[FAILED] or not counts[OK] else 0


def selftest(
    device: torch.device, seconds: float = SECONDS, order: Callable[[Check], int] | None = None
) -> Iterator[Result]:
    """The results, one by one; checks of a lower ``order`` come first."""
    deadline = time.perf_counter() + seconds
    all_checks = checks(device) if order is None else sorted(checks(device), key=order)
    for check, backend, allowed, measure in all_checks:
        if time.perf_counter() >= deadline:
            yield Result(check, backend, NOT_RUN, note=f"{seconds:.0f} s are over")
            continue
        try:
            with torch.inference_mode():
                error = measure()
        except ModuleNotFoundError as missing:  # layouts of comfy-kitchen's are all that need one
            yield Result(check, backend, NOT_RUN, note=str(missing))
            continue
        except Exception as failure:  # whatever compilers, drivers and extensions come up with
            reason = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
            yield Result(check, backend, FAILED, allowed=allowed, note=reason)
            continue
        # a comparison that a NaN fails
        status = OK if error <= allowed else FAILED
        yield Result(check, backend, status, error, allowed)


def checks(device: torch.device) -> Iterator[Check]:
    """(name, backend, allowed error, function that returns the error) of everything to check."""
    names = [r.name for r in dispatch.reports(device) if r.available]
    yield from selftest_shapes.checks(device, names, selftest_shapes.row_counts(device))
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
    for name in names:
        yield "int8 product", name, _EXACT, lambda n=name: _product(n, device)
        for op in ("smooth_rotate", "rmsnorm_scale", "swiglu"):
            yield f"{op} to int8", name, _EXACT, lambda n=name, o=op: _quantizer(n, o, device)
        yield "gate and residual", name, _EXACT, lambda n=name: _residual(n, device)
        yield "q and k norms, rotary embedding", name, _EXACT, lambda n=name: _rope(n, device)
        for dtype in dtypes:
            for kind in ("plain", "smooth", "rotated", "smooth rotated"):
                label = f"int8 linear, {kind}, {DTYPES[dtype]}"
                allowed = _SAME_ROWS + EPS[dtype]
                yield label, name, allowed, lambda n=name, k=kind, d=dtype: _int8(n, k, d, device)
        for qtype in blocks.PACKED:
            label = f"GGUF {qtype} through int8"
            allowed = 2 * _SAME_ROWS
            yield label, name, allowed, lambda n=name, q=qtype: _gguf(n, q, "w8a8", device)
        for layout, options in _PACKED:
            label = f"{layout} through int8{', 6 bits' if options else ''}"
            run = lambda n=name, x=layout, o=options: _stock(x, n, device, **o)
            yield label, name, 2 * _SAME_ROWS, run
    for qtype in blocks.FORMATS:
        yield f"GGUF {qtype} decoded", "torch", 0.0, lambda q=qtype: _decoded(q, device)
        yield (
            f"GGUF {qtype} dense",
            "torch",
            _DENSE,
            lambda q=qtype: _gguf("auto", q, "dense", device),
        )
    for layout in ("FP8", "NF4", "NVFP4", "MXFP8", "AWQ"):
        run = lambda x=layout: _dense(f"Ideogram4Quant{x}", device)
        yield f"{layout} dense", "torch", _DENSE, run
    for name in attention.candidates(device):
        for dtype in dtypes:
            label, allowed = f"attention, {DTYPES[dtype]}", _ATTENTION[name] + EPS[dtype]
            yield label, name, allowed, lambda n=name, d=dtype: _attention(n, d, None, device)
    masked = lambda: _attention(attention.SDPA, torch.float32, _mask(), device)
    yield "attention with a mask", attention.SDPA, _ATTENTION[attention.SDPA], masked


# ---- one function a check: the relative error against the formula on the CPU


@cache
def _blocks(qtype: str) -> Tensor:
    return blocks.quantize(randn(_N, _K, seed=1), qtype)


def _relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.cpu().double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def _activations() -> Tensor:
    x = randn(_M, _K)
    x[:, ::97] *= 30  # outlier channels, and a row of zeros
    x[5] = 0
    return x


def _product(name: str, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (_M, _K), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (_N, _K), generator=generator, dtype=torch.int8)
    q[0], w[0] = 127, -128
    arguments = (q, randn(_M).abs(), w, randn(_N).abs(), randn(_N), torch.float32)
    wanted = reference.int8_gemm(*arguments)
    if name == "comfy_kitchen":  # it multiplies whole layers alone
        return _int8(name, "plain", torch.float32, device)
    run = dispatch.choose("int8_gemm", (_M, _N, _K), device, name).get("int8_gemm")
    return _relative(run(*(there(a, device) for a in arguments)), wanted)


def _quantizer(name: str, op: str, device: torch.device) -> float:
    """The larger of the scales' error and the part of the values that is off by more than one."""
    op = f"{op}_quantize_rows"
    smooth = torch.linspace(0.5, 2, _K)
    leading: dict[str, tuple] = {
        "smooth_rotate_quantize_rows": (_activations(),),
        "rmsnorm_scale_quantize_rows": (
            _activations(),
            randn(_K, seed=1),
            randn(_K, seed=2),
            1e-5,
        ),
        "swiglu_quantize_rows": (_activations(), randn(_M, _K, seed=1)),
    }
    arguments = (*leading[op], smooth, 256)
    wanted, scales = getattr(reference, op)(*arguments)
    run = dispatch.choose(op, (_M, _K, _K), device, name).get(op)
    found, found_scales = run(*(there(a, device) for a in arguments))
    apart = (found.cpu().int() - wanted.int()).abs()
    if (apart > 1).any() or (apart == 1).double().mean() > 1e-3:
        return 1.0
    return _relative(found_scales, scales)


def _residual(name: str, device: torch.device) -> float:
    arguments = (_activations(), randn(_K), randn(_M, _K, seed=1), randn(_K, seed=2), 1e-5)
    run = dispatch.choose("gate_residual_rmsnorm", (_M, _K, _K), device, name)
    found = run.get("gate_residual_rmsnorm")(*(there(a, device) for a in arguments))
    return _relative(found, reference.gate_residual_rmsnorm(*arguments))


def _rope(name: str, device: torch.device) -> float:
    q, k, _ = randn(2, _M, 3, 2, 48).unbind(2)
    arguments = (q, k, randn(48, seed=1), randn(48, seed=2))
    arguments += (randn(1, _M, 24, seed=3), randn(1, _M, 24, seed=4), 1e-5)
    run = dispatch.choose("rms_rope", (_M, 48, 48), device, name).get("rms_rope")
    found = run(*(there(a, device) for a in arguments))
    return max(map(_relative, found, reference.rms_rope(*arguments)))


def _int8(name: str, kind: str, dtype: torch.dtype, device: torch.device) -> float:
    options = {
        "smooth": torch.linspace(0.5, 2, _K) if "smooth" in kind else None,
        "rotation": 256 if "rotated" in kind else None,
    }
    weight, smooth = randn(_N, _K, seed=1), options["smooth"]
    x, bias = _activations().to(dtype), randn(_N, seed=2)
    weight = weight if smooth is None else weight * smooth
    q, scale = reference.smooth_rotate_quantize_rows(weight, None, options["rotation"])
    wanted = reference.int8_linear(x.float(), q, scale, bias, **options)
    moved = {key: there(value, device) for key, value in options.items()}
    arguments = (there(a, device) for a in (x, q, scale, bias))
    return _relative(int8_linear(*arguments, backend=name, **moved), wanted)


def _gguf(name: str, qtype: str, compute: str, device: torch.device) -> float:
    packed = _blocks(qtype)
    x, bias, shape = _activations(), randn(_N, seed=2), (_N, _K)
    wanted = reference.gguf_linear(x, packed, qtype, shape, bias, compute=compute, rotation=256)
    x, packed, bias = (there(a, device) for a in (x, packed, bias))
    found = gguf_linear(x, packed, qtype, shape, bias, compute=compute, rotation=256, backend=name)
    return _relative(found, wanted)


def _decoded(qtype: str, device: torch.device) -> float:
    packed = _blocks(qtype)
    wanted = blocks.dequantize(packed, qtype, (_N, _K))
    return _relative(blocks.dequantize(there(packed, device), qtype, (_N, _K)), wanted)


def _stock(layout: str, name: str, device: torch.device, **options: int) -> float:
    """Of the packed linears: rows of int8 and the weight's int8 grid, multiplied exactly."""
    from ..ops.layouts import QuantizedTensor

    weight = QuantizedTensor.from_float(randn(_N, _K, seed=1), f"Ideogram4Quant{layout}", **options)
    x, bias = _activations(), randn(_N, seed=2)
    wanted = linear(x, weight, bias, LinearOptions(backend="reference"))
    arguments = (x.to(device), weight.to(device), bias.to(device))
    return _relative(linear(*arguments, LinearOptions(backend=name)), wanted)


def _dense(layout: str, device: torch.device) -> float:
    from ..ops.layouts import QuantizedTensor

    weight = QuantizedTensor.from_float(randn(_N, _K, seed=1), layout)
    x, bias = _activations(), randn(_N, seed=2)
    wanted = F.linear(x, weight.dequantize(), bias)
    return _relative(
        linear(x.to(device), weight.to(device), bias.to(device), LinearOptions()), wanted
    )


def _attention(name: str, dtype: torch.dtype, mask: Tensor | None, device: torch.device) -> float:
    q, k, v = (randn(1, 2, 300, 256, seed=seed).to(dtype) for seed in range(3))
    wanted = attention.reference(q, k, v, mask)
    q, k, v, mask = (there(a, device) for a in (q, k, v, mask))
    if mask is not None:
        return _relative(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), wanted)
    return _relative(attention.attention(q, k, v, backend=name), wanted)


def _mask() -> Tensor:
    """Two segments that do not see each other."""
    segment = (torch.arange(300) > 50)[None, None]
    return segment[..., :, None] == segment[..., None, :]


def _line(result: Result) -> str:
    figures = ""
    if result.error is not None:
        figures = f"error {result.error:.1e}, allowed {result.allowed:.1e}"
    return f"{result.status:<10} {result.backend:<14} {result.check:<36} {figures}{result.note}"
