"""Custom ops for torch.compile, defined once a process.

The same package may be imported twice under two names: by ComfyUI by path, and installed. Both
define the same ops, so whoever comes second uses what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor

NAMESPACE = "ideogram4_quant"

# Registrations last as long as this object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    """The op ``ideogram4_quant::name`` with ``schema``, such as ``"(Tensor x, int n) -> Tensor"``.

    ``implementation`` computes on real tensors, ``fake`` makes an empty result of the right shape.
    Another version of the package may have defined the name with another schema: then this one
    becomes ``name_2``, and so on. ``implementation`` runs :func:`without_autocast`, in the dtypes
    that it asks for.
    """
    candidate, number = name, 1
    while True:
        wanted = torch._C.parse_schema(f"{NAMESPACE}::{candidate}{schema}")
        found = _find(candidate)
        if found is None:
            break
        if found._schema == wanted:
            return found
        number += 1
        candidate = f"{name}_{number}"
    _library.define(f"{candidate}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(candidate, _exact(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{candidate}", fake, lib=_library)
    return _find(candidate)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which products keep the dtypes of their inputs.

    Under autocast torch would multiply fp32 in 16 bits: sums of int8 products are then no longer
    exact, and rotations no longer their own inverse.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def needs_gradient(*inputs: Tensor) -> bool:
    """Whether autograd records what is computed of ``inputs``: these ops would end it there."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _exact(implementation: Callable) -> Callable:
    """``implementation`` without autocast; its first argument is a tensor."""

    @wraps(implementation)
    def run(x: Tensor, *rest: object) -> object:
        with without_autocast(x.device):
            return implementation(x, *rest)

    return run


def _find(name: str) -> torch._ops.OpOverload | None:
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    return None if packet is None else packet.default
