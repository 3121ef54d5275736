"""What ``bench`` times: ways to compute a linear and an attention, and the device's ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention, dispatch
from ..ops.layouts import QuantizedTensor
from ..ops.linear import LinearOptions, int8_linear, linear
from ..ops.reference import quantize_rows, smooth_rotate_quantize_rows
from ..ops.tuning.timing import medians

Progress = Callable[[int, int], None]

HEAD_SIZE = 256
# Edge of the square products that give the ceilings, and heads of an attention.
_CEILING_SIZE = {"cpu": 1536, "cuda": 8192}
_CEILING_SIZE_ELSEWHERE = 4096
_HEADS = {"cpu": 2}
_HEADS_DEVICE = 18


@dataclass(frozen=True)
class Case:
    """One way to compute: ``precision`` names the ceiling that it is held against."""

    name: str
    precision: str
    run: Callable[[], Tensor]


def linears(tokens: int, features: int, device: torch.device) -> list[Case]:
    """``x [tokens, features] @ W.T``, W ``[features, features]``, every way there is.

    Activations are bf16, on a CPU fp32, as the models run there; the first case is that dtype's.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(tokens, features, generator=generator).to(device)
    weight = (torch.randn(features, features, generator=generator) / features**0.5).to(device)
    x, half, half_weight = full.to(dtype), full.bfloat16(), weight.bfloat16()
    q, scale = quantize_rows(weight)
    turned = smooth_rotate_quantize_rows(weight, rotation=256) if features % 256 == 0 else None
    dense = "fp32" if dtype == torch.float32 else "bf16"
    cases = [
        Case("fp32", "fp32", lambda: F.linear(full, weight)),
        Case("bf16", "bf16", lambda: F.linear(half, half_weight)),
    ]
    cases.sort(key=lambda case: case.name != dense)
    for name in (r.name for r in dispatch.reports(device) if r.available):
        run = lambda name=name: int8_linear(x, q, scale, backend=name)
        cases.append(Case(f"int8, {name}", "int8", run))
        if turned is not None:
            run = lambda name=name: int8_linear(x, *turned, rotation=256, backend=name)
            cases.append(Case(f"int8 rotated, {name}", "int8", run))
    eager = _eager()
    if eager is not None:
        run = lambda: eager(x, q, scale[:, None], None, x.dtype)
        cases.append(Case("int8, comfy-kitchen's eager op", "int8", run))
    for qtype in ("Q8_0", "Q4_K"):
        if features % 256:
            continue
        packed = QuantizedTensor.from_float(weight, "Ideogram4QuantGGUF", qtype=qtype)
        for how, precision in (("w8a8", "int8"), ("dense", dense)):
            way = "through int8" if how == "w8a8" else "decoded"
            options = LinearOptions(gguf_compute=how)
            run = lambda p=packed, o=options: linear(x, p, None, o)
            cases.append(Case(f"{qtype} {way}", precision, run))
    for layout in ("FP8", "NF4"):
        packed = QuantizedTensor.from_float(weight, f"Ideogram4Quant{layout}")
        cases.append(Case(f"{layout} decoded", dense, lambda p=packed: linear(x, p)))
    return cases


def attentions(tokens: int, device: torch.device) -> tuple[list[Case], int]:
    """Every attention there is, with and without a mask, and the heads that they have."""
    heads = _HEADS.get(device.type, _HEADS_DEVICE)
    dtype, precision = (torch.float32, "fp32") if device.type == "cpu" else (torch.bfloat16, "bf16")
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, HEAD_SIZE)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
    mask[..., : tokens // 8, tokens // 8 :] = False
    cases = []
    for name in attention.candidates(device):
        kind = "int8" if name == attention.INT8 else precision
        plain = lambda name=name: attention.BACKENDS[name](q, k, v)
        cases.append(Case(name, kind, plain))
        cases.append(Case(f"{name}, mask", kind, lambda name=name: _masked(name, q, k, v, mask)))
    return cases, heads


def ceilings(
    device: torch.device, rounds: int, progress: Progress | None = None
) -> Mapping[str, float]:
    """Operations a second of the largest square product of each precision, as torch computes it."""
    size = _CEILING_SIZE.get(device.type, _CEILING_SIZE_ELSEWHERE)
    a = torch.ones(size, size, device=device)
    half, small = a.bfloat16(), a.to(torch.int8)
    functions: dict[str, Callable[[], Tensor]] = {
        "fp32": lambda: a @ a,
        "bf16": lambda: half @ half,
    }
    gemms = dispatch.candidates("int8_gemm", device)
    if gemms[0] != dispatch.REFERENCE.name:
        ones = torch.ones(size, device=device)
        gemm = dispatch.choose("int8_gemm", (size, size, size), device, gemms[0]).get("int8_gemm")
        functions["int8"] = lambda: gemm(small, ones, small, ones, None, torch.bfloat16)
    times = medians(functions, device, rounds, progress=progress)
    return {name: 2 * size**3 / seconds for name, seconds in times.items()}


def timed(
    cases: list[Case],
    device: torch.device,
    rounds: int,
    seconds: float,
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """Median seconds of each case, taken in turn; each once, further runs within ``seconds``.

    Some processors have no int8 instructions: there one run may take half a minute.
    """
    functions = {case.name: case.run for case in cases}
    deadline = time.perf_counter() + seconds
    return medians(functions, device, rounds, deadline, each=True, progress=progress)


def _masked(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """To show what a mask costs: nothing of the pack gives one to the int8 kernel."""
    if name == attention.INT8:
        import comfy_kitchen

        return comfy_kitchen.int8_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _eager() -> Callable[..., Tensor] | None:
    try:
        from comfy_kitchen.backends.eager.quantization import int8_linear as eager
    except ImportError:
        return None
    return eager


def title(row: dict, document: dict) -> str:
    """What the table or panel of ``row`` is of."""
    size = document["features"] if row["op"] == "linear" else document["head_size"]
    edge = f"{size} -> {size}" if row["op"] == "linear" else f"head size {size}"
    return f"{row['op']}, {edge}, {row['tokens']} tokens"
