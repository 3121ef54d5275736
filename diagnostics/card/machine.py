"""Stages about the card itself: what it is, the most it can do, whether it computes right."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops import attention, dispatch
from .. import selftest as selftests
from ..health import examine
from .common import device_of, is_reduced, measured, peak_gb, random, sizes
from .worker import Context, Row


def device(context: Context) -> Iterator[Row]:
    """What it is, what is there, its ceilings: products of the vendor's library, memory, bus."""
    there = device_of(context)
    health = examine(there)
    about = health["about"] | {"cuda": str(torch.version.cuda)}
    yield {"what": "about", **about, "reduced": is_reduced(context)}
    yield {"what": "state", **health["state"]["before"], "drift": health["state"]["drift"]}
    for warning in health["warnings"]:
        yield {"what": "warning", "text": warning}
    for report in (*dispatch.reports(there), *attention.reports(there)):
        yield {
            "what": "backend",
            "name": report.name,
            "there": report.available,
            "text": report.reason,
        }
    with torch.inference_mode():
        yield from _products(context, there)
        yield from _traffic(context, there)
    yield {"what": "memory", "peak_gb": peak_gb(there)}


def _products(context: Context, there: torch.device) -> Iterator[Row]:
    """Square products: torch's own, so the vendor's library (cuBLAS, oneDNN)."""
    n = sizes(context).ceiling
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    pairs = {name: random((n, n), there, dtype) for name, dtype in kinds.items()}
    small = random((n, n), there, torch.int8)
    functions = {name: lambda a=a: a @ a for name, a in pairs.items()}
    functions["int8"] = lambda: torch._int_mm(small, small.t())
    times, failed = measured(functions, context, there)
    for name, seconds in times.items():
        yield {"what": "product", "ceiling": name, "size": n, "per_second": 2 * n**3 / seconds}
    for name, why in failed.items():
        yield {"what": "product", "name": name, "size": n, "failed": why}


def _traffic(context: Context, there: torch.device) -> Iterator[Row]:
    """Bytes a second: within the device's memory (read and written), and to it from the host's."""
    nbytes = sizes(context).copied
    source = torch.ones(nbytes, dtype=torch.uint8, device=there)
    target = torch.empty_like(source)
    functions = {"memory": lambda: target.copy_(source)}
    if there.type == "cuda":
        pageable = torch.ones(nbytes, dtype=torch.uint8)
        functions["host to device, pageable"] = lambda: target.copy_(pageable)
        try:
            pinned = pageable.pin_memory()
            functions["host to device, pinned"] = lambda: target.copy_(pinned, non_blocking=True)
        except RuntimeError as error:
            yield {"what": "traffic", "name": "pinned", "failed": str(error).splitlines()[0]}
    times, failed = measured(functions, context, there, rounds=3)
    for name, seconds in times.items():
        moved = 2 * nbytes if name == "memory" else nbytes
        yield {"what": "traffic", "ceiling": name, "per_second": moved / seconds}
    for name, why in failed.items():
        yield {"what": "traffic", "name": name, "failed": why}


def selftest(context: Context) -> Iterator[Row]:
    """Every kernel at real shapes against fp64, bf16 first: what a step runs, compiled first.

    A row a check; those that pass are counted in one row a backend, failures are all there.
    """
    there, passed, worst, wrong = device_of(context), {}, {}, 0
    for result in selftests.selftest(there, context.left, order=_urgency):
        if result.status == selftests.OK:
            passed[result.backend] = passed.get(result.backend, 0) + 1
            share = result.error / result.allowed if result.allowed else 0.0
            worst[result.backend] = max(share, worst.get(result.backend, 0.0))
        elif result.status == selftests.NOT_RUN:
            context.missing.append(f"{result.check} ({result.backend}: {result.note})")
        else:
            wrong += 1
            yield {
                "backend": result.backend,
                "check": result.check,
                "failed": result.note or "a wrong result",
                "error": result.error,
                "allowed": result.allowed,
            }
    for backend, count in passed.items():
        yield {"backend": backend, "passed": count, "worst_of_allowed": worst[backend]}
    if wrong:
        context.remarks.append(f"{wrong} checks FAILED")
    if len(context.missing) > 3:
        context.missing[3:] = [f"{len(context.missing) - 3} checks more"]


def _urgency(check: selftests.Check) -> int:
    """Real shapes in bf16, which is what a step compiles; small and odd ones; the other dtypes."""
    name = check[0]
    if " x " not in name and ", K " not in name:
        return 1
    return 2 if name.endswith(("fp16", "fp32")) else 0
