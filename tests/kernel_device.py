"""Where the tests of kernels run: under Triton's interpreter on the CPU, or on an NVIDIA GPU.

Triton decides at import whether it interprets, so ``test_kernels.py`` runs those files in processes
of their own, once for each device, with KERNEL_TESTS saying which. Inputs are made on the CPU and
results compared there: the formulas and what is expected are the same for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICES = {"interpreted": "cpu", "cuda": "cuda"}
DEVICE = DEVICES.get(os.environ.get("KERNEL_TESTS", ""), "")


def skip_elsewhere() -> None:
    """Called at the head of a file of kernel tests: collected as it is, the file is skipped."""
    if not DEVICE:
        pytest.skip("run by test_kernels.py, in a process of its own", allow_module_level=True)


def moved(values, device: str):
    """``values`` with every tensor in it on ``device``; tensors without data stay what they are."""
    return tree_map(
        lambda v: v.to(device) if isinstance(v, Tensor) and v.device.type != "meta" else v, values
    )


def kernel(name: str) -> Callable:
    """The kernel's launcher, taking tensors of the CPU and giving such, whatever runs it."""
    from ideogram4_quant.ops import kernels

    launcher = getattr(kernels, name)

    def run(*arguments, **options):
        arguments, options = moved((arguments, options), DEVICE)
        return moved(launcher(*arguments, **options), "cpu")

    return run
