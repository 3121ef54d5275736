"""Guidance from one resident copy: what the conditional copy's own weights run in the second pass.

``self``: the conditional copy on image tokens without text. A LoRA: the conditional copy with it
beside its linears, ``y = W x + up (down x)``, in the unconditional pass alone. Either way the
weights are in memory once.
"""

from __future__ import annotations

import copy
import logging
from itertools import chain
from pathlib import Path
from typing import Literal

from ..checkpoint.copies import UNCONDITIONAL
from . import loras
from .transformer import PackTransformer

_log = logging.getLogger(__name__)

SELF: Literal["self"] = "self"
StandIn = Literal["self"] | Path


def unconditional_from(model: PackTransformer, stand_in: StandIn) -> PackTransformer:
    """What runs the unconditional pass on the tensors of ``model``, the conditional copy.

    stand_in: ``"self"``, or the file of an unconditional LoRA of any naming. Raises CheckpointError
    and its kinds for a file that is none, of another model, or for the conditional copy alone.
    """
    if stand_in == SELF:
        return model
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, tensors)  # the modules twice, the tensors once
    for line in loras.add({UNCONDITIONAL: other}, stand_in, 1.0, UNCONDITIONAL):
        level = logging.WARNING if line.startswith("not loaded") else logging.INFO
        _log.log(level, "%s: %s", stand_in, line)
    return other.eval()
