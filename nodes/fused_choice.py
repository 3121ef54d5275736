"""Whether the blocks of a model run fused, and why: the rule behind the loader's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpError
from ..ops.dispatch import BackendReport
from ..ops.prequantized import WHOLE_LAYERS_ONLY

AUTO, ON, OFF = "auto", "on", "off"
CHOICES = (AUTO, ON, OFF)
_NAMES = {"triton": "the Triton kernels", "comfy_kitchen": "comfy-kitchen's norms"}
"""Backends that fuse, in the order of preference, in words."""


@dataclass(frozen=True)
class Decision:
    """``on`` or not, and the reason as a report gives it."""

    on: bool
    why: str


def decide(asked: str, backend: str, found: Sequence[BackendReport]) -> Decision:
    """``auto``: on where Triton kernels or a comfy-kitchen that makes norms fuse; else no gain.

    ``asked`` is one of CHOICES, ``backend`` what the linears were asked to use, ``found`` what
    there is on the device. Raises OpError for ``on`` with a backend that cannot be split.
    """
    fusing = {report.name: report for report in found if report.available and report.fuses}
    if asked == ON:
        if backend in WHOLE_LAYERS_ONLY and backend not in fusing:
            raise OpError(
                f"the backend {backend} multiplies whole layers, so blocks cannot be fused",
                found=f"fused_blocks {ON}, backend {backend}",
                hint=f"Set fused_blocks to {AUTO} or {OFF}, or pick another backend.",
            )
        return Decision(True, "on, as asked")
    if asked == OFF:
        return Decision(False, "off, as asked")
    if backend not in (AUTO, *_NAMES):
        known = " and ".join(_NAMES.values())
        return Decision(False, f"off: they gain on {known}, not with {backend}")
    for name in _NAMES if backend == AUTO else (backend,):
        if name in fusing:
            return Decision(True, f"on: {_NAMES[name]} run here ({fusing[name].reason})")
    asked_for = next(iter(_NAMES)) if backend == AUTO else backend
    reason = next((report.reason for report in found if report.name == asked_for), "unknown device")
    return Decision(False, f"off: {_NAMES[asked_for]} do not run here ({reason})")
