"""Attention: what there is on a device, and the one place that chooses.

==========  ===========================================================  =======================
name        kernel                                                       with a mask
==========  ===========================================================  =======================
sdpa        torch's flash kernel                                         the slow masked kernel
int8        comfy-kitchen's ``int8_attention``: int8 q, k, v and scores  never: sdpa runs instead
==========  ===========================================================  =======================

``"auto"`` takes the fastest by what was measured at load (``autotune``), and so may take int8,
whose error is about six times that of sdpa in bf16; where nothing was measured it is sdpa. Callers
pass no mask where all is visible, and do not pad: with any mask torch leaves its flash kernel at a
head size of 256, and comfy-kitchen's loop takes three to five times its instructions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendUnavailableError, OpError
from .dispatch import AUTO, BackendReport
from .library import define, needs_gradient
from .probes import checked, kept
from .tuning import choices
from .wide import has_float64

logger = logging.getLogger(__name__)

SDPA, INT8 = "sdpa", "int8"
NAMES = (SDPA, INT8)
_INT8_HEAD_SIZE = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str = SDPA
) -> Tensor:
    """``softmax(q k^T / sqrt(D) + mask) v``: ``q, k, v [B, H, L, D]`` -> ``[B, H, L, D]``.

    ``backend``: one of NAMES or ``"auto"``. ``mask``: bool (True is visible) or added,
    broadcastable to ``[B, H, L, L]``. What needs a gradient runs as sdpa. Raises OpError for
    shapes that do not fit and an unknown name, BackendUnavailableError for a backend that is not
    there.
    """
    _check(q, k, v)
    if mask is not None:
        if not torch.compiler.is_compiling():
            log_masked()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == SDPA or needs_gradient(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    return _attention_op(q, k, v, backend)


def choose(
    heads: int,
    head_size: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = AUTO,
) -> str:
    """The name of the backend that runs unmasked attention; a name is obeyed or refused."""
    if requested != AUTO:
        return _named(requested, device, head_size)
    found = choices.table(device).nearest(
        choices.ATTENTION, heads, head_size, tokens, choices.dtype_name(dtype), None
    )
    there = candidates(device, head_size)
    return next((name for name in (found.ranking if found else ()) if name in there), SDPA)


def check(requested: str, device: torch.device) -> None:
    """Raise what ``choose`` would for a name, before a model is loaded."""
    if requested != AUTO:
        _named(requested, device, _INT8_HEAD_SIZE)


def reports(device: torch.device | str = "cpu") -> tuple[BackendReport, ...]:
    """What there is on ``device``, and why the rest is not."""
    reason = _int8_missing(torch.device(device))
    return (
        BackendReport(SDPA, True, "torch's scaled_dot_product_attention"),
        BackendReport(INT8, reason is None, reason or "comfy-kitchen's int8_attention"),
    )


def candidates(device: torch.device, head_size: int = _INT8_HEAD_SIZE) -> tuple[str, ...]:
    """The names that run on ``device``."""
    there = tuple(report.name for report in reports(device) if report.available)
    return there if head_size <= _INT8_HEAD_SIZE else (SDPA,)


def errors(q: Tensor, k: Tensor, v: Tensor, names: Iterable[str]) -> dict[str, float]:
    """``|out - exact| / |exact|`` of each backend, exact being the formula in fp64, or
    fp32 where the device has no other."""
    exact = reference(q, k, v)
    norm = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return {name: ((BACKENDS[name](q, k, v) - exact).norm() / norm).item() for name in names}


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(D) + mask) v`` in fp64, one head at a time; in fp32 where there is no
    fp64."""
    wide = torch.float64 if has_float64(q.device) else torch.float32
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    for batch, head in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
        a, b, c = (t[batch, head].to(wide) for t in (q, k, v))
        scores = a @ b.t() / q.shape[-1] ** 0.5
        if mask is not None:
            seen = mask.expand(*q.shape[:2], *scores.shape)[batch, head]
            hidden = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else None
            scores = scores + seen if hidden is None else hidden
        out[batch, head] = scores.softmax(dim=-1) @ c
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import comfy_kitchen

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return comfy_kitchen.int8_attention(q, k, v)


BACKENDS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {SDPA: _sdpa, INT8: _int8}


def _named(name: str, device: torch.device, head_size: int) -> str:
    if name not in NAMES:
        raise OpError(
            "unknown attention backend", found=repr(name), needed=f"one of {[AUTO, *NAMES]}"
        )
    if name not in candidates(device, head_size):
        reason = _int8_missing(device) or f"head size {head_size}, at most {_INT8_HEAD_SIZE}"
        raise BackendUnavailableError(
            f"the attention backend {name!r} is not available on {device}: {reason}",
            hint=f"Use {AUTO!r} or {SDPA!r}.",
        )
    return name


@kept
def _int8_missing(device: torch.device) -> str | None:
    """Why comfy-kitchen's INT8 attention does not run on ``device``; None where it does."""
    if device.type != "cuda":
        return f"its kernels need a CUDA or ROCm GPU, not {device.type}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    try:
        from comfy_kitchen import int8_attention_is_available
    except ImportError as error:
        return f"{error} (comfy-kitchen 0.2.31 or newer has it)"
    if not int8_attention_is_available(device):
        return "comfy-kitchen's build has no kernel for this GPU (compute capability 7.5 or newer)"
    q = torch.linspace(-1, 1, 2 * 64 * 64, device=device).reshape(1, 2, 64, 64).half()
    try:
        error = errors(q, q, q, (INT8,))[INT8]
    except Exception as failure:  # whatever drivers and extensions come up with
        reason = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
        return checked(reason, reason)
    return None if error < 0.1 else f"a wrong result (relative error {error:.2g})"


@cache
def log_masked() -> None:
    """Say once that attention runs with a mask, and so on the slow kernel."""
    logger.warning(
        "attention runs with a mask, so on torch's slow kernel: prompts of one length, or one at "
        "a time, need none"
    )


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[-1:] != k.shape[-1:]:
        found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise OpError("attention takes q, k and v [B, H, L, D]", found=found)
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise OpError("q, k and v differ in dtype", found=f"{q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise OpError("q, k and v lie apart", found=f"{q.device}, {k.device}, {v.device}")


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    _, heads, tokens, size = q.shape
    name = choose(heads, size, tokens, q.device, q.dtype, backend)
    return BACKENDS[name](q, k, v).contiguous()


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return q.new_empty(q.shape)


_attention_op = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, str backend) -> Tensor",
    _attention,
    _attention_fake,
)
