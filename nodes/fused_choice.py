"""Whether the blocks of a model run fused, and why: the rule behind the loader's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OpError
from ..ops.dispatch import BackendReport
from ..ops.prequantized import WHOLE_LAYERS_ONLY

AUTO, ON, OFF = "auto", "on", "off"
CHOICES = (AUTO, ON, OFF)
_KERNELS = "triton"


@dataclass(frozen=True)
class Decision:
    """``on`` or not, and the reason as a report gives it."""

    on: bool
    why: str


def decide(asked: str, backend: str, found: Sequence[BackendReport]) -> Decision:
    """``auto``: on where the Triton kernels run, since elsewhere nothing is gained by fusing.

    ``asked`` is one of CHOICES, ``backend`` what the linears were asked to use, ``found`` what
    there is on the device. Raises OpError for ``on`` with a backend that cannot be split.
    """
    whole = backend in WHOLE_LAYERS_ONLY
    if asked == ON:
        if whole:
            raise OpError(
                f"the backend {backend} multiplies whole layers, so blocks cannot be fused",
                found=f"fused_blocks {ON}, backend {backend}",
                hint=f"Set fused_blocks to {AUTO} or {OFF}, or pick another backend.",
            )
        return Decision(True, "on, as asked")
    if asked == OFF:
        return Decision(False, "off, as asked")
    if backend not in (AUTO, _KERNELS):
        return Decision(False, f"off: they gain on the Triton kernels, not with {backend}")
    kernels = next((report for report in found if report.name == _KERNELS), None)
    if kernels is None or not kernels.available:
        why = "unknown device" if kernels is None else kernels.reason
        return Decision(False, f"off: the Triton kernels do not run here ({why})")
    return Decision(True, f"on: the Triton kernels run here ({kernels.reason})")
