"""How a linear may be quantized to INT8, by name, and the smoothing vectors that takes.

A calibration measures candidates under these names: ``int8``, ``int8 rotated``,
``int8 smooth 0.5``, ``int8 smooth 0.5 rotated``; GGUF types under their own (``Q4_K``: the weights
alone); and ``int8 rotated inputs``, the activations alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.rotation import largest_group
from ..ops.wide import wide
from .layer_stats import LayerStats

ALPHAS = (0.35, 0.5, 0.65, 0.8)
"""SmoothQuant strengths that a calibration tries; 0.5 is the paper's."""

DEFAULT_ALPHA = 0.5

ROTATED_INPUTS = "int8 rotated inputs"
"""The candidate that tells what rounding the rotated activations alone costs, weights exact."""

BLOCK_CANDIDATES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")

ROTATION = 256
"""Group of ConvRot's rotation, where it divides the row."""

MIN_GROUP = 16
"""Rotations over fewer values than this are not worth their time."""

_NAME = re.compile(r"int8(?: smooth (?P<alpha>\d(?:\.\d{1,3})?))?(?P<rotated> rotated)?")
_DEAD = 1e-6  # largest value of a channel, of all channels, up to which it counts as silent
_EXTREME = 1e5  # a factor beyond this is a dead channel's


@dataclass(frozen=True)
class Treatment:
    """``alpha``: SmoothQuant's strength, None for no smoothing; ``rotated``: ConvRot's rotation."""

    alpha: float | None = None
    rotated: bool = False

    @property
    def name(self) -> str:
        """As a calibration calls it."""
        smooth = "" if self.alpha is None else f" smooth {self.alpha:g}"
        return f"int8{smooth}{' rotated' if self.rotated else ''}"

    @classmethod
    def parse(cls, name: str) -> Treatment | None:
        """The treatment of a name; None for another candidate, such as a GGUF type."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        alpha = match["alpha"]
        return cls(None if alpha is None else float(alpha), match["rotated"] is not None)

    @property
    def native(self) -> bool:
        """Whether ComfyUI's own container can say it."""
        return self.alpha is None


def int8_treatments(alphas: Sequence[float] = ALPHAS) -> list[Treatment]:
    """Without smoothing and with each of ``alphas``, each unrotated and rotated."""
    unrotated = [Treatment(alpha) for alpha in (None, *alphas)]
    return [*unrotated, *(replace(treatment, rotated=True) for treatment in unrotated)]


def rotation_group(in_features: int, limit: int = ROTATION) -> int | None:
    """The rotation's group for rows of this length; None where no useful one divides them."""
    group = largest_group(in_features, limit)
    return group if group is not None and group >= MIN_GROUP else None


def input_group(module: str) -> str:
    """Linears of one group read the same input, so they share a smoothing vector and a rotation.

    w1 and w3 do: their input is then quantized once.
    """
    return module.replace("feed_forward.w3", "feed_forward.w1")


def group_loss(members: Sequence[LayerStats], treatment: Treatment) -> float:
    """Squared relative output error, averaged over linears; inf if it was not measured."""
    errors = [each.error(treatment.name) for each in members]
    return math.inf if any(map(math.isnan, errors)) else sum(e * e for e in errors) / len(errors)


def smoothing(members: Sequence[LayerStats], alpha: float) -> Tensor:
    """``s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)`` over its geometric mean, fp32 [K].

    ``members`` are the linears that share the input. The weight's columns are multiplied by s, the
    activations divided. Source: SmoothQuant, arXiv 2211.10438, eq. 4. Channels quieter than the
    median count as the median one: a calibration hears a channel that fires seldom too softly, and
    dividing by too little would make it the loudest of all where it does fire.
    """
    x = torch.stack([stats.absmax for stats in members]).amax(0)
    w = torch.stack([stats.weight_absmax for stats in members]).amax(0)
    return smooth_factors(x.clamp_min(x.median()), w, alpha).float()


def smooth_factors(x_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)`` over its geometric mean, fp64 [K].

    ``x_absmax``, ``weight_absmax`` [K]: the largest values of each input channel. A channel without
    input or without weight, a millionth of the largest included, gets 1 and moves no other one:
    nothing can be gained there, and its weights would drown in the rounding of the rows.
    """
    x, w = wide(x_absmax), wide(weight_absmax)
    alive = (x > _DEAD * x.max()) & (w > _DEAD * w.max())
    if not bool(alive.any()):
        return torch.ones_like(x)
    logs = alpha * x.log() - (1 - alpha) * w.log()
    logs = torch.where(alive, logs - logs[alive].mean(), 0.0)
    return logs.exp().clamp(1 / _EXTREME, _EXTREME)
