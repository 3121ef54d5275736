"""Backends of the ops: which are there, why the others are not, and which one runs.

========================  ======  =============  ======  =========
op                        triton  comfy_kitchen  int_mm  reference
========================  ======  =============  ======  =========
int8_linear (as a whole)  (1)     CUDA, ROCm
normed_int8_linear                from 0.2.40
int8_gemm                 yes                    yes     yes
row quantizers            yes                    (2)     yes
dequantize_rotate_q.      yes                            yes
gate_residual_rmsnorm     yes     from 0.2.40            yes
rms_rope                  yes                            yes
dequantize                yes                            yes
========================  ======  =============  ======  =========

(1) composed of its quantizer and its GEMM. (2) a few rows at a time; not the normed one. An op
that a backend lacks runs as the reference formula, so a named backend decides where the GEMM runs.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from ..errors import BackendUnavailableError, OpError
from . import adapters, grouped, reference
from .probes import checked, kept
from .tuning import choices

logger = logging.getLogger(__name__)

AUTO = "auto"

REFERENCE_OPS: Mapping[str, Callable] = {
    "int8_grid": grouped.int8_grid,
    **{
        name: getattr(reference, name)
        for name in (
            "int8_gemm",
            "smooth_rotate_quantize_rows",
            "rmsnorm_scale_quantize_rows",
            "swiglu_quantize_rows",
            "gate_residual_rmsnorm",
            "rms_rope",
            "dequantize_rotate_quantize",
            "dequantize",
        )
    },
}


@dataclass(frozen=True)
class BackendReport:
    """One line of the answer to "what runs here": a backend, whether it can, and why (not)."""

    name: str
    available: bool
    reason: str
    fuses: bool = False  # it has ops that a fused block gains by


@dataclass(frozen=True)
class Backend:
    """A backend that works on one device, with the ops that it has of its own."""

    name: str
    ops: Mapping[str, Callable] = field(default_factory=dict)

    def has(self, op: str) -> bool:
        """Whether ``op`` runs here without falling back to the reference formula."""
        return op in self.ops or (op == "int8_linear" and "int8_gemm" in self.ops)

    @property
    def fuses(self) -> bool:
        """Whether it makes a norm and the rows of a product in one kernel, or in the product."""
        named = "rmsnorm_scale_quantize_rows", "normed_int8_linear"
        return self.name != REFERENCE.name and any(op in self.ops for op in named)

    def get(self, op: str) -> Callable:
        """This backend's ``op``, else the reference formula."""
        return self.ops.get(op) or REFERENCE_OPS[op]


REFERENCE = Backend("reference", REFERENCE_OPS)


# ---- policy: the one place that says what "auto" means

# Where nothing was measured. After these comes the reference.
_ORDER: Mapping[str, tuple[str, ...]] = {
    # CUTLASS in comfy-kitchen is the better GEMM where it is present; Triton fuses more.
    "cuda": ("comfy_kitchen", "triton", "int_mm"),
    "cpu": ("int_mm",),
}
_ORDER_ELSEWHERE = ("int_mm",)
_PRODUCTS = ("int8_linear", "int8_gemm")


def _order(device: torch.device) -> tuple[str, ...]:
    return _ORDER.get(device.type, _ORDER_ELSEWHERE)


def choose(
    op: str,
    shape: tuple[int, int, int],
    device: torch.device,
    requested: str = AUTO,
    *,
    dtype: torch.dtype | None = None,
    rotation: int | None = None,
) -> Backend:
    """The backend that runs ``op`` for ``shape`` (M, N, K) on ``device``.

    A name is obeyed, or refused with BackendUnavailableError; an unknown name raises OpError.
    ``"auto"`` takes, for a product, the fastest that has the op by what was measured at load for
    [N, K] (``choices``; of activations in ``dtype`` and weights in ``rotation``, 0 for none; None:
    any). Else, said once in the log, the first of the device's order that is available and has the
    op, at last the reference (for a product with a warning).
    """
    if requested != AUTO:
        return _named(requested, device)
    if op in _PRODUCTS:
        measured = _fastest(op, shape, device, dtype, rotation)
        if measured is not None:
            return measured
    refused = []
    names = _order(device)
    if op not in _PRODUCTS:  # what surrounds the products, Triton does best
        names = sorted(names, key=lambda name: name != "triton")
    for name in names:
        found, reason = _probe(name, device)
        if found is not None and found.has(op):
            return found
        refused.append(f"{name}: {reason if found is None else f'has no {op}'}")
    if op in _PRODUCTS:
        _warn_slow(device, "; ".join(refused))
    return REFERENCE


def candidates(op: str, device: torch.device) -> tuple[str, ...]:
    """The names worth measuring for ``op`` on ``device``, in the documented order.

    The reference is one where at most one other is there: it is what some processors do best.
    """
    names = []
    for name in _order(device):
        found, _ = _probe(name, device)
        if found is not None and found.has(op):
            names.append(name)
    return tuple(names) if len(names) > 1 else (*names, REFERENCE.name)


def _fastest(
    op: str,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype | None,
    rotation: int | None,
) -> Backend | None:
    tokens, n, k = shape
    detail = None if rotation is None else str(rotation)
    table = choices.table(device)
    found = table.nearest(choices.LINEAR, n, k, tokens, choices.dtype_name(dtype), detail)
    if found is None:
        _log_unmeasured(device, candidates(op, device))
        return None
    backends = (_probe(name, device)[0] for name in found.ranking if name in _PROBES)
    return next((b for b in backends if b is not None and b.has(op)), None)


def reports(device: torch.device | str = "cpu") -> tuple[BackendReport, ...]:
    """What there is on ``device``, in the order of preference of ``"auto"`` and then the rest."""
    device = torch.device(device)
    order = _order(device)
    names = [*order, *(name for name in _PROBES if name not in order)]
    found = ((name, *_probe(name, device)) for name in names)
    return tuple(
        BackendReport(name, backend is not None, why, backend is not None and backend.fuses)
        for name, backend, why in found
    )


def quantizes_rows(device: torch.device) -> bool:
    """Whether a kernel makes the int8 rows of a product, or no library has the linear as a whole.

    What an unmeasured fused block goes by: formulas that make rows lose to comfy-kitchen.
    """
    rows, whole = (_probe(name, device)[0] for name in ("triton", "comfy_kitchen"))
    return rows is not None or whole is None


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
    logger.warning("int8 layers run as torch formulas on %s, slowly (%s)", device, why)


@cache
def _log_unmeasured(device: torch.device, names: tuple[str, ...]) -> None:
    if len(names) > 1:
        logger.info(
            "%s: some int8 layers were not measured at load; auto takes the first of %s there",
            device,
            ", ".join(names),
        )


@cache
def _warn_no_kernels(device: torch.device, reason: str) -> None:
    logger.warning(
        "no Triton kernels on %s: layers run on what else there is, and what surrounds "
        "their products as torch formulas, slower. %s",
        device,
        reason,
    )


# ---- probes: each backend once a device, keeping the reason


def _probe(name: str, device: torch.device) -> tuple[Backend | None, str]:
    if device.type == "cuda" and not torch.cuda.is_available():
        return None, f"torch {torch.__version__} finds no CUDA device"
    backend, reason = _PROBES[name](device)
    if backend is not None and name == "comfy_kitchen":
        # The host may switch it off after it was probed.
        from comfy_kitchen.registry import registry

        if not registry.is_available(adapters.kitchen_backend()):
            return None, "its backend was switched off"
    return backend, reason


@kept
def _probe_triton(device: torch.device) -> tuple[Backend | None, str]:
    kernels = importlib.import_module(".kernels", __package__)
    available, reason = kernels.available(device)
    if not available:
        if device.type == "cuda":
            _warn_no_kernels(device, reason)
        return checked((None, reason), reason)
    ops = {name: getattr(kernels, name) for name in REFERENCE_OPS if hasattr(kernels, name)}
    return Backend("triton", ops), reason


@kept
def _probe_comfy_kitchen(device: torch.device) -> tuple[Backend | None, str]:
    if device.type != "cuda":
        return None, f"its int8 kernels need CUDA, not {device.type}"
    try:
        from comfy_kitchen.registry import registry
    except ImportError as error:
        return None, str(error)
    kind = adapters.kitchen_backend()
    label = {"cuda": "CUDA", "hip": "ROCm"}[kind]
    status = registry.list_backends().get(kind, {})
    if not registry.is_available(kind):
        off = "disabled here" if status.get("disabled") else "not available"
        return None, status.get("unavailable_reason") or f"its {label} backend is {off}"
    if "int8_linear" not in status["capabilities"]:
        return None, f"its {label} backend has no int8_linear"
    if kind == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return None, "its int8 kernels need compute capability 7.5"
    return Backend("comfy_kitchen", adapters.kitchen_ops()), label


@kept
def _probe_int_mm(device: torch.device) -> tuple[Backend | None, str]:
    """Available where ``torch._int_mm`` is exact at the extremes: some CPUs saturate in between.

    Without VNNI oneDNN adds 128 to q and sums pairs in 16 bits, so that two neighbours of one sign
    are what overflows: every pair of signs of both sides is tried.
    """
    q = torch.tensor([[127, 127], [127, -127], [-127, 127], [-127, -127]], dtype=torch.int8)
    w = torch.tensor([[127, 127], [127, -128], [-128, 127], [-128, -128]], dtype=torch.int8)
    q, w = q.repeat(16, 128), w.repeat(8, 128)
    want = q.int() @ w.int().t()
    try:
        got = torch._int_mm(q.to(device), w.to(device).t()).cpu()
    except (RuntimeError, AttributeError, AssertionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return checked((None, f"torch._int_mm fails: {reason}"), f"{type(error).__name__}: {error}")
    if not torch.equal(got, want):
        return None, "torch._int_mm is not exact on this processor"
    ops = {
        "int8_gemm": adapters.int_mm_gemm,
        "smooth_rotate_quantize_rows": adapters.quantize_rows_in_tiles,
        "swiglu_quantize_rows": adapters.swiglu_in_tiles,
    }
    return Backend("int_mm", ops), "torch._int_mm"


def _probe_reference(device: torch.device) -> tuple[Backend | None, str]:
    return REFERENCE, "torch formulas"


_PROBES: Mapping[str, Callable[[torch.device], tuple[Backend | None, str]]] = {
    "triton": _probe_triton,
    "comfy_kitchen": _probe_comfy_kitchen,
    "int_mm": _probe_int_mm,
    "reference": _probe_reference,
}
