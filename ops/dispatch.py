"""Backends of the ops: which are there, why the others are not, and which one runs.

========================  ======  =============  ======  =========
op                        triton  comfy_kitchen  int_mm  reference
========================  ======  =============  ======  =========
int8_linear (as a whole)  (1)     CUDA
int8_gemm                 yes                    yes     yes
row quantizers            yes                            yes
dequantize_rotate_q.      yes                            yes
gate_residual_rmsnorm     yes                            yes
========================  ======  =============  ======  =========

(1) composed of its quantizer and its GEMM. An op that a backend lacks runs as the reference
formula, so a named backend decides where the GEMM runs.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from . import reference
from .errors import BackendUnavailableError, OpError

logger = logging.getLogger(__name__)

AUTO = "auto"

REFERENCE_OPS: Mapping[str, Callable] = {
    name: getattr(reference, name)
    for name in (
        "int8_gemm",
        "smooth_rotate_quantize_rows",
        "rmsnorm_scale_quantize_rows",
        "swiglu_quantize_rows",
        "gate_residual_rmsnorm",
        "dequantize_rotate_quantize",
    )
}

# Epilogue values at a time: an int32 tile and its fp32 copy stay in a CPU's cache, and off one
# they bound the memory beside the output.
_EPILOGUE_TILE = {"cpu": 1 << 17}
_EPILOGUE_TILE_DEVICE = 1 << 26


@dataclass(frozen=True)
class BackendReport:
    """One line of the answer to "what runs here": a backend, whether it can, and why (not)."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Backend:
    """A backend that works on one device, with the ops that it has of its own."""

    name: str
    ops: Mapping[str, Callable] = field(default_factory=dict)

    def has(self, op: str) -> bool:
        """Whether ``op`` runs here without falling back to the reference formula."""
        return op in self.ops or (op == "int8_linear" and "int8_gemm" in self.ops)

    def get(self, op: str) -> Callable:
        """This backend's ``op``, else the reference formula."""
        return self.ops.get(op) or REFERENCE_OPS[op]


REFERENCE = Backend("reference", REFERENCE_OPS)


# ---- policy: the one place that says what "auto" means

_ORDER: Mapping[str, tuple[str, ...]] = {
    # CUTLASS in comfy-kitchen is the better GEMM where it is present; Triton fuses more.
    "cuda": ("comfy_kitchen", "triton", "int_mm"),
    "cpu": ("int_mm",),
}
_ORDER_ELSEWHERE = ("int_mm",)


def choose(
    op: str, shape: tuple[int, int, int], device: torch.device, requested: str = AUTO
) -> Backend:
    """The backend that runs ``op`` for ``shape`` (M, N, K) on ``device``.

    ``"auto"`` takes the first of the device's order that is available and has the op, at last the
    reference (for a GEMM with a warning). A name is obeyed, or refused with
    BackendUnavailableError; an unknown name raises OpError. ``shape`` takes no part yet: measured
    choices go here.
    """
    if requested != AUTO:
        return _named(requested, device)
    refused = []
    for name in _ORDER.get(device.type, _ORDER_ELSEWHERE):
        found, reason = _probe(name, device)
        if found is not None and found.has(op):
            return found
        refused.append(f"{name}: {reason if found is None else f'has no {op}'}")
    if op in ("int8_linear", "int8_gemm"):
        _warn_slow(device, "; ".join(refused))
    return REFERENCE


def reports(device: torch.device | str = "cpu") -> tuple[BackendReport, ...]:
    """What there is on ``device``, in the order of preference of ``"auto"`` and then the rest."""
    device = torch.device(device)
    order = _ORDER.get(device.type, _ORDER_ELSEWHERE)
    names = [*order, *(name for name in _PROBES if name not in order)]
    found = ((name, *_probe(name, device)) for name in names)
    return tuple(BackendReport(name, backend is not None, why) for name, backend, why in found)


def _named(name: str, device: torch.device) -> Backend:
    if name not in _PROBES:
        raise OpError("unknown backend", found=repr(name), needed=f"one of {[AUTO, *_PROBES]}")
    backend, reason = _probe(name, device)
    if backend is None:
        raise BackendUnavailableError(
            f"the backend {name!r} is not available on {device}: {reason}",
            hint=f"Use {AUTO!r}, or one of {[r.name for r in reports(device) if r.available]}.",
        )
    return backend


@cache
def _warn_slow(device: torch.device, why: str) -> None:
    logger.warning("int8 layers run as plain torch formulas on %s, slowly (%s)", device, why)


# ---- probes: each backend once a device, keeping the reason


def _probe(name: str, device: torch.device) -> tuple[Backend | None, str]:
    if device.type == "cuda" and not torch.cuda.is_available():
        return None, f"torch {torch.__version__} finds no CUDA device"
    backend, reason = _PROBES[name](device)
    if backend is not None and name == "comfy_kitchen":
        # The host may switch it off after it was probed.
        from comfy_kitchen.registry import registry

        if not registry.is_available("cuda"):
            return None, "its CUDA backend was switched off"
    return backend, reason


@cache
def _probe_triton(device: torch.device) -> tuple[Backend | None, str]:
    kernels = importlib.import_module(".kernels", __package__)
    available, reason = kernels.available(device)
    if not available:
        return None, reason
    ops = {name: getattr(kernels, name) for name in REFERENCE_OPS if hasattr(kernels, name)}
    return Backend("triton", ops), reason


@cache
def _probe_comfy_kitchen(device: torch.device) -> tuple[Backend | None, str]:
    if device.type != "cuda":
        return None, f"its int8 kernels need CUDA, not {device.type}"
    try:
        from comfy_kitchen.registry import registry
    except ImportError as error:
        return None, str(error)
    status = registry.list_backends().get("cuda", {})
    if not registry.is_available("cuda"):
        off = "disabled here" if status.get("disabled") else "not available"
        return None, status.get("unavailable_reason") or f"its CUDA backend is {off}"
    if "int8_linear" not in status["capabilities"]:
        return None, "its CUDA backend has no int8_linear (no cuBLASLt)"
    if torch.cuda.get_device_capability(device) < (7, 5):
        return None, "its int8 kernels need compute capability 7.5"
    return Backend("comfy_kitchen", {"int8_linear": _comfy_kitchen_linear}), "CUDA"


@cache
def _probe_int_mm(device: torch.device) -> tuple[Backend | None, str]:
    """Available where ``torch._int_mm`` is exact at the extremes: some CPUs saturate in between."""
    q = torch.tensor([[-127, 127], [127, -127]], dtype=torch.int8).repeat(32, 128)
    w = torch.tensor([[-128, 127], [127, -128]], dtype=torch.int8).repeat(16, 128)
    want = q.int() @ w.int().t()
    try:
        got = torch._int_mm(q.to(device), w.to(device).t()).cpu()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return None, f"torch._int_mm fails: {str(error).splitlines()[0]}"
    if not torch.equal(got, want):
        return None, "torch._int_mm is not exact on this processor"
    return Backend("int_mm", {"int8_gemm": _int_mm_gemm}), "torch._int_mm"


def _probe_reference(device: torch.device) -> tuple[Backend | None, str]:
    return REFERENCE, "plain torch formulas"


_PROBES: Mapping[str, Callable[[torch.device], tuple[Backend | None, str]]] = {
    "triton": _probe_triton,
    "comfy_kitchen": _probe_comfy_kitchen,
    "int_mm": _probe_int_mm,
    "reference": _probe_reference,
}


# ---- the two adapters


def _comfy_kitchen_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """``reference.int8_linear`` by comfy-kitchen's CUDA kernels; ``x [M, K]``.

    They know no smoothing: it is applied before them and rounded to the dtype of ``x``.
    """
    from comfy_kitchen.registry import registry

    arguments = {
        "x": x if smooth is None else (x.float() / smooth).to(x.dtype),
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None if bias is None else bias.to(x.dtype),
        "out_dtype": x.dtype,
        "convrot": rotation is not None,
        "convrot_groupsize": rotation or 256,
    }
    return registry.get_implementation("int8_linear", "cuda", arguments)(**arguments)


def _int_mm_gemm(
    q: Tensor,
    scale_x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``reference.int8_gemm`` with ``torch._int_mm``; the weight is read in place."""
    m, n = q.shape[0], weight.shape[0]
    product = _int_mm(q, weight) if m and n else q.new_empty((m, n), dtype=torch.int32)
    tile = max(1, _EPILOGUE_TILE.get(q.device.type, _EPILOGUE_TILE_DEVICE) // max(n, 1))
    if m <= tile:
        return reference.scale_product(product, scale_x, weight_scale, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=q.device)
    for start in range(0, m, tile):
        rows = slice(start, start + tile)
        out[rows] = reference.scale_product(
            product[rows], scale_x[rows], weight_scale, bias, out_dtype
        )
    return out


def _int_mm(q: Tensor, weight: Tensor) -> Tensor:
    if q.device.type != "cpu":
        return _padded_int_mm(q, weight)
    if q.shape[1] == 1:  # torch 2.13 and 2.14 return unwritten memory here
        return q.int() * weight.t().int()
    return torch._int_mm(q, weight.t())


def _padded_int_mm(q: Tensor, weight: Tensor) -> Tensor:
    """For cuBLASLt, which takes more than 16 rows, and K and N in multiples of 8."""
    m, k = q.shape
    n = weight.shape[0]
    if k % 8 or n % 8:
        _warn_padded(n, k)
        weight = torch.nn.functional.pad(weight, (0, -k % 8, 0, -n % 8))
    if k % 8 or m < 32:
        q = torch.nn.functional.pad(q, (0, -k % 8, 0, max(0, 32 - m)))
    return torch._int_mm(q, weight.t())[:m, :n]


@cache
def _warn_padded(n: int, k: int) -> None:
    logger.warning(
        "torch._int_mm needs in_features and out_features in multiples of 8: a weight of %d x %d "
        "is copied at every call",
        n,
        k,
    )
