"""W8A8 linear against what else there is, side by side: fp32, bf16, comfy-kitchen's eager op.

    python benchmarks/bench_linear.py [--tokens 512 4608] [--features 4608] [--device cuda]

Every candidate computes the same layer on the same input; the runs take turns, so a machine whose
speed drifts slows all alike. The figures are medians of the rounds in ms, and the ratio to fp32.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ideogram4_quant.ops import dispatch
from ideogram4_quant.ops.linear import int8_linear
from ideogram4_quant.ops.reference import smooth_rotate_quantize_rows
from ideogram4_quant.ops.tuning.timing import medians


def candidates(tokens: int, features: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """One closure a way to compute ``[tokens, features] x [features, features]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, features, generator=generator).to(device)
    weight = (torch.randn(features, features, generator=generator) / features**0.5).to(device)
    half_x, half_weight = x.bfloat16(), weight.bfloat16()
    q, scale = smooth_rotate_quantize_rows(weight)
    rotated_q, rotated_scale = smooth_rotate_quantize_rows(weight, rotation=256)
    found: dict[str, Callable[[], Tensor]] = {
        "fp32 F.linear": lambda: F.linear(x, weight),
        "bf16 F.linear": lambda: F.linear(half_x, half_weight),
    }
    for report in dispatch.reports(device):
        if report.available and report.name != "reference":
            name = report.name
            found[f"W8A8, {name}"] = lambda name=name: int8_linear(x, q, scale, backend=name)
            found[f"W8A8 rotated, {name}"] = lambda name=name: int8_linear(
                x, rotated_q, rotated_scale, rotation=256, backend=name
            )
    eager = _eager()
    if eager is not None:
        found["comfy-kitchen eager int8_linear"] = lambda: eager(x, q, scale, None, torch.float32)
    return found


def _eager() -> Callable[..., Tensor] | None:
    try:
        from comfy_kitchen.backends.eager.quantization import int8_linear as eager
    except ImportError:
        return None
    return eager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4608])
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    with torch.inference_mode():
        for tokens in args.tokens:
            times = medians(candidates(tokens, args.features, device), device, args.rounds)
            base = times["fp32 F.linear"]
            rows += [
                {"tokens": tokens, "name": name, "ms": 1e3 * t, "times_fp32": base / t}
                for name, t in times.items()
            ]
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "features": args.features,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if args.json:
        print(json.dumps({"about": about, "rows": rows}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        speed = f"{row['times_fp32']:.2f} x fp32"
        print(f"M={row['tokens']:<6} {row['name']:<36} {row['ms']:>9.1f} ms  {speed:>12}")


if __name__ == "__main__":
    main()
