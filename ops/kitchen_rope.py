"""q/k norms and rotary embedding of the host's attention on this pack's kernel.

The host asks comfy-kitchen for them (``rms_rope_split_half``), which has kernels of its own where
torch brings CUDA 13, and formulas of a dozen launches elsewhere. The kernel is registered there as
one more backend that nothing chooses by itself; ``on_our_kernel`` picks it for one thread and one
block, so that all lines of the host's attention stay the host's.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from . import dispatch
from .library import needs_gradient
from .tuning import choices

BACKEND = "ideogram4_quant"
OP = "rms_rope_split_half"
KITCHEN, OURS = "comfy_kitchen", "triton"
"""Candidates of a measurement of ROPE."""


def on_our_kernel(
    freqs_cis: Tensor, heads: tuple[int, int], like: Tensor
) -> AbstractContextManager:
    """A block in which comfy-kitchen's op runs on the Triton kernel, where that is the faster one.

    ``freqs_cis`` is the host's table of 2 x 2 matrices, ``heads`` (number, size), ``like`` has the
    device and dtype of q and ``[B, L, ...]``. Nothing changes where the kernel does not run, where
    comfy-kitchen's own is as fast, for another table, and inside ``torch.compile``.
    """
    if torch.compiler.is_compiling() or not _fits(freqs_cis, heads[1]):
        return nullcontext()
    if not pays(like.device, like.dtype, heads, like.shape[1]):
        return nullcontext()
    return _registry().use_backend(BACKEND)


def pays(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], tokens: int) -> bool:
    """Whether this pack's kernel is the one to run: a look-up of what was measured at load.

    Unmeasured: where comfy-kitchen has formulas alone.
    """
    names = candidates(device, dtype, heads[1])
    if OURS not in names or KITCHEN not in names:
        return OURS in names
    name = choices.dtype_name(dtype)
    found = choices.table(device).nearest(choices.ROPE, *heads, tokens, name, None)
    return found is not None and found.ranking[0] == OURS


@cache
def candidates(device: torch.device, dtype: torch.dtype, size: int) -> tuple[str, ...]:
    """Which kernels there are for heads of ``size`` values."""
    shape = (size, size, size)
    ours = dispatch.choose("rms_rope", shape, device).name == OURS
    names = {KITCHEN: _has_kernel(device, dtype, size), OURS: ours}
    return tuple(name for name, there in names.items() if there)


def kitchen(q: Tensor, k: Tensor, weight: Tensor, freqs_cis: Tensor) -> Tensor:
    """q by comfy-kitchen's own kernel, whatever is picked: to time it."""
    arguments = _arguments(q, k, weight, freqs_cis)
    return _registry().get_implementation(OP, kwargs=arguments)(**arguments)[0]


def rms_rope_split_half(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
    rot_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """comfy-kitchen's op under its signature; q and k ``[B, L, H, D]`` as the host has them."""
    k_scale = q_scale if k_scale is None else k_scale
    size = q.shape[-1]
    ours = rot_dim in (0, size) and q.shape == k.shape and _fits(freqs_cis, size)
    if not ours or needs_gradient(q, k, q_scale, k_scale):
        from comfy_kitchen.backends.eager import rope

        return rope.rms_rope_split_half(q, k, freqs_cis, q_scale, k_scale, epsilon, rot_dim)
    cos, sin = (freqs_cis[:, :, 0, :, which, 0] for which in (0, 1))
    run = dispatch.choose("rms_rope", (q.numel() // size, size, size), q.device).get("rms_rope")
    return run(q, k, q_scale, k_scale, cos, sin, epsilon)


def _fits(freqs_cis: Tensor, size: int) -> bool:
    """Whether the table is ``[B, L, 1, size / 2, 2, 2]``: for every head, all of it turned."""
    return freqs_cis.dim() == 6 and freqs_cis.shape[2:] == (1, size // 2, 2, 2)


@cache
def _registry():
    """comfy-kitchen's registry of backends, this one in it."""
    from comfy_kitchen.constraints import FunctionConstraints, ParamConstraint
    from comfy_kitchen.registry import registry

    floats = frozenset({torch.bfloat16, torch.float16, torch.float32})
    constraints = FunctionConstraints(
        params={name: ParamConstraint(dtypes=floats) for name in ("q", "k")},
        default_devices=frozenset({"cuda", "cpu"}),
    )
    registry.register(BACKEND, sys.modules[__name__], {OP: constraints})
    return registry


def _has_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether comfy-kitchen runs the op on ``device`` on more than formulas."""
    q = torch.empty((1, 16, 2, size), dtype=dtype, device=device)
    table = torch.empty((1, 16, 1, size // 2, 2, 2), device=device)
    arguments = _arguments(q, q, q[0, 0, 0], table)
    try:
        return _registry().get_capable_backend(OP, arguments) != "eager"
    except Exception:  # comfy-kitchen's own, of any version: no backend takes it
        return False


def _arguments(q: Tensor, k: Tensor, weight: Tensor, freqs_cis: Tensor) -> dict[str, object]:
    scales = {"q_scale": weight, "k_scale": weight}
    return {"q": q, "k": k, "freqs_cis": freqs_cis, **scales, "epsilon": 1e-5}
