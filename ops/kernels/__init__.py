"""Triton kernels; each copies the name and the signature of its formula in ``ops.reference``.

Importing this package imports neither Triton nor torch: ``available`` says whether the kernels run
on a device and why not, and each launcher below is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ..probes import checked, kept
from .configs import release, table_architecture, unsupported_by

if TYPE_CHECKING:
    import torch

_LAUNCHERS = {
    "int8_gemm": "gemm",
    "quantize_rows": "rows",
    "smooth_rotate_quantize_rows": "rows",
    "swiglu_quantize_rows": "rows",
    "rmsnorm_scale_quantize_rows": "norms",
    "gate_residual_rmsnorm": "norms",
    "dequantize_rotate_quantize": "gguf",
    "rms_rope": "rope",
    "dequantize": "gguf_floats",
    "int8_grid": "packed",
}

__all__ = ["available", *_LAUNCHERS]

MIN_TRITON = (3, 2)
# What compiling a launcher needs and ComfyUI's portable build for Windows leaves out.
_EMBEDDED = (
    ". An embedded Python also needs the folders include and libs of a full Python of the same "
    "version"
)


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAUNCHERS[name]}", __name__), name)


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the kernels run on ``device``, and why not or with what: ``(True, "Triton ...")``.

    On a GPU the smallest kernel is compiled and its result compared once a process, about a second
    (again where memory was short): a missing C compiler or an unusable driver shows here and not
    inside a sampling step.
    """
    import torch

    return _available(torch.device(device))


@kept
def _available(device: torch.device) -> tuple[bool, str]:
    import torch

    try:
        import triton
    except ImportError as error:
        package = "triton-windows" if os.name == "nt" else "triton"
        return False, f"Triton is not installed ({error}); install it with: pip install {package}"
    found = f"Triton {triton.__version__}"
    if release(triton.__version__) < MIN_TRITON:
        return False, f"{found} is too old, {'.'.join(map(str, MIN_TRITON))} is needed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return True, f"{found}, interpreted on the CPU (TRITON_INTERPRET=1): for tests, very slow"
    if device.type != "cuda" or torch.version.hip:
        name = "ROCm" if torch.version.hip and device.type == "cuda" else device.type
        return False, f"the Triton kernels are written for NVIDIA GPUs, this device is {name}"

    if not torch.cuda.is_available():
        return False, f"torch {torch.__version__} finds no CUDA device"

    major, minor = torch.cuda.get_device_capability(device)
    try:
        table_architecture(major * 10 + minor)
    except ValueError as error:
        return False, str(error)
    problem = unsupported_by(triton.__version__, major * 10 + minor) or _probe(device)
    if problem:
        hint = _EMBEDDED if os.name == "nt" else ""
        return checked(
            (False, f"{found} cannot run a kernel on {device}: {problem}{hint}"), problem
        )
    return True, f"{found}, sm_{major}{minor}"


def _probe(device: torch.device) -> str | None:
    """Run the smallest kernel on ``device``; what went wrong, or None."""
    import torch

    from .rows import quantize_rows

    x = torch.arange(-127, 128, dtype=torch.float32, device=device)
    try:
        q, scale = quantize_rows(x)
        exact = torch.equal(q[0].float(), x) and scale.item() == 1.0
    except Exception as error:  # whatever compilers, linkers and drivers come up with
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return None if exact else "quantize_rows gave a wrong result"
