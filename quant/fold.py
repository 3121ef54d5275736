"""``--fold``: smoothing, and a rotation of attention.o, put into the weights before each linear.

For hosts that run INT8 or GGUF files without this pack. SmoothQuant (arXiv 2211.10438) divides a
linear's input by ``s = max|x|^alpha / max|w|^(1 - alpha)`` and multiplies its columns by it; here
the division goes into what makes the input: a norm's weight, the v rows of qkv, the rows of w3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..checkpoint.folding import Folding, Site, sites
from ..ops.wide import wide
from .calibration import Calibration
from .errors import CalibrationError, QuantOptionError
from .layer_stats import LayerStats
from .plan import TensorPlan
from .recipes import QuantOptions, Recipe
from .treatments import DEFAULT_ALPHA, Treatment, folded_treatment, rotation_group, smoothing

ALL = "all"
"""The name in ``QuantOptions.fold`` that means every linear whose input can be folded."""

# Pattern of linears -> why their inputs stay as they are.
_NOT_FOLDABLE: tuple[tuple[str, str], ...] = (
    ("input_proj", "its input is the latent picture itself"),
    ("adaln_proj", "it sees one token a step, which costs nothing in any format"),
    ("t_embedding.*", "it sees one token a step, which costs nothing in any format"),
    ("*adaln_modulation", "an activation lies before it, which takes no factor"),
    ("final_layer.linear", "the norm before it has no weight"),
)


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What will be folded into one copy, known before a weight is read.

    ``sites``: where a factor is taken over. By linear: ``alphas`` the strength of the smoothing,
    ``vectors`` the factors as planned (fp64 [K]), ``rotation`` the group.
    """

    copy: str
    sites: tuple[Site, ...]
    alphas: Mapping[str, float]
    vectors: Mapping[str, Tensor]
    rotation: Mapping[str, int]

    @property
    def norms(self) -> tuple[str, ...]:
        """Tensors that must be read before the factors are known: weights of norms."""
        return tuple(f"{site.producer}.weight" for site in self.sites if _is_norm(site))

    @property
    def record(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what :func:`stored_record` will yield, in its order."""
        vectors = {
            _name(m, "smooth"): (torch.float32, tuple(v.shape)) for m, v in self.vectors.items()
        }
        return vectors | {_name(m, "rotation"): (torch.int32, (1,)) for m in self.rotation}

    def notes(self, layout: str) -> list[str]:
        """What a user of the file must know."""
        low, high = min(self.alphas.values(), default=0), max(self.alphas.values(), default=0)
        strength = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        found = [
            f"the smoothing of {len(self.alphas)} linears, of strength {strength}, is folded "
            "into the weights before them: LoRAs are right on this file in this pack alone, which "
            "undoes it from the fold.* tensors; in other hosts they come out wrong"
        ]
        if layout == "gguf":
            found.append(
                "the calibration leads the block scales without folding too, and on the pocket "
                "model that alone was closer to the source: fold a GGUF file only if you have "
                "measured a gain"
            )
        return found

    def to_dict(self) -> dict[str, object]:
        """For the metadata."""
        return {"folded": dict(self.alphas), "folded_rotation": dict(self.rotation)}


def check_fold_options(recipe: Recipe, layout: str, options: QuantOptions) -> None:
    """QuantOptionError unless ``options.fold`` goes with the level, the layout and the rest."""
    if layout == "transformer-lab":
        raise QuantOptionError(
            "a file of linears alone cannot be folded: the norms, which take the factors, are in "
            "another file",
            found=f"layout {layout}",
            hint="Its linears carry smoothing vectors of their own; fold the native layout.",
        )
    if options.smooth is not None:
        raise QuantOptionError(
            "smoothing vectors are given already", hint="Folding computes its own: leave one out."
        )
    if options.treatment is not None:
        raise QuantOptionError(
            "folding is a smoothing of its own", found=f"treatment {options.treatment}"
        )
    if options.calibration is None:
        raise QuantOptionError(
            "folding needs the sizes of the activations",
            needed="a calibration of this model",
            hint="Make one with ideogram4-quant calibrate, and give it as --calibration.",
        )


def remaining_factor(
    norm_weight: Tensor, factors: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``n / round(n / s)``: what a norm's weight ``n`` [K] takes of ``s`` once stored in ``dtype``.

    fp32 [K], positive. The linear's columns are multiplied by this and not by ``s``, so that the
    rounding of the norm costs nothing. Where the weight is 0 or would become 0 the factor is 1.
    """
    true = wide(norm_weight)
    rounded = (true / factors.to(true.device)).to(dtype).double()
    usable = (true != 0) & (rounded != 0) & rounded.isfinite()
    return torch.where(usable, true / torch.where(usable, rounded, 1.0), 1.0).float()


def plan_fold(
    recipe: Recipe, options: QuantOptions, tensors: Sequence[TensorPlan], head_dim: int
) -> FoldPlan:
    """Which inputs of the quantized linears among ``tensors``, of one copy, are folded and how.

    Strengths are those of :func:`folded_treatment`. Where INT8 weights are not rotated anyway, the
    input of attention.o may be, in the largest group up to ``head_dim``. Raises QuantOptionError,
    with the reason, for a linear of ``options.fold`` whose input nothing can absorb, and
    CalibrationError for one that the calibration did not watch.
    """
    copy, calibration = tensors[0].copy, options.calibration
    quantized = {t.module for t in tensors if t.quantized}
    known = _sites_among({t.module for t in tensors})
    _refuse_unfoldable(options.fold, known, [t.module for t in tensors if t.linear])
    int8 = recipe.weight_type == "INT8"
    group = rotation_group(head_dim, head_dim)
    smoothed, alphas, vectors, rotation = [], {}, {}, {}
    for site in known:
        named = any(_means(p, consumer) for p in options.fold for consumer in site.consumers)
        if not named or quantized.isdisjoint(site.consumers):
            continue
        members = [_watched(calibration, copy, consumer) for consumer in site.consumers]
        turns = int8 and site.rotates and group is not None
        treatment = Treatment(DEFAULT_ALPHA if options.alpha is None else options.alpha)
        if int8:
            treatment = folded_treatment(members, options.alpha, recipe.rotation is not None, turns)
        if treatment.alpha is not None:
            smoothed.append(site)
            alphas |= dict.fromkeys(site.consumers, treatment.alpha)
            vectors |= dict.fromkeys(site.consumers, smoothing(members, treatment.alpha).double())
        if turns and recipe.rotation is None and treatment.rotated:
            rotation |= dict.fromkeys(site.consumers, group)
    return FoldPlan(copy, tuple(smoothed), alphas, vectors, rotation)


def with_folded_inputs(tensors: Sequence[TensorPlan], plan: FoldPlan) -> tuple[TensorPlan, ...]:
    """The same plans, with the moments of the folded inputs: ``x / s``, rotated where o is."""
    found = []
    for tensor in tensors:
        vector = plan.vectors.get(tensor.module) if tensor.linear else None
        group = plan.rotation.get(tensor.module) if tensor.linear else None
        inputs = tensor.inputs
        if inputs is not None and (vector is not None or group is not None):
            inputs = inputs if vector is None else inputs.scaled(1 / vector)
            inputs = inputs if group is None else inputs.rotated(group)
            tensor = replace(tensor, inputs=inputs)
        found.append(tensor)
    return tuple(found)


def make_folding(
    plan: FoldPlan, norms: Mapping[str, Tensor], norm_dtype: torch.dtype = torch.bfloat16
) -> Folding:
    """The factors that remain where the norms that take them are stored in ``norm_dtype``.

    ``norms``: the tensors named in ``plan.norms``, or more of the model.
    """
    smooth = {consumer: vector.float() for consumer, vector in plan.vectors.items()}
    for site in plan.sites:
        if _is_norm(site):
            weight = norms[f"{site.producer}.weight"]
            remaining = remaining_factor(weight, plan.vectors[site.consumers[0]], norm_dtype)
            smooth |= dict.fromkeys(site.consumers, remaining)
    return Folding(smooth, dict(plan.rotation))


def fold_tensor(name: str, tensor: Tensor, folding: Folding) -> Tensor:
    """One canonical tensor in the folded basis: the same object where nothing is folded into it.

    ``tensor``: fp32 or fp64, plain or quantized; the result is plain where it is another one.
    """
    fold = folding.of(name.removesuffix(".weight"), len(tensor)) if _is_weight(name) else None
    if fold is None:
        return tensor
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    return fold.fold(tensor.reshape(len(tensor), -1)).reshape(tensor.shape)


def stored_record(folding: Folding) -> Iterator[tuple[str, Tensor]]:
    """The ``fold.*`` tensors of a file: F32 [K] vectors and I32 [1] groups, in a fixed order."""
    for module, vector in folding.smooth.items():
        yield _name(module, "smooth"), vector.float().contiguous()
    for module, group in folding.rotation.items():
        yield _name(module, "rotation"), torch.tensor([group], dtype=torch.int32)


def _name(module: str, kind: str) -> str:
    return f"fold.{module}.{kind}"


def _watched(calibration: Calibration, copy: str, module: str) -> LayerStats:
    stats = calibration.layer(copy, module)
    if stats is None:
        raise CalibrationError(
            "no statistics of this linear, whose input is to be folded",
            file=calibration.path,
            tensor=f"{copy}.{module}",
            hint="Calibrate the whole model (ideogram4-quant calibrate).",
        )
    return stats


def _is_norm(site: Site) -> bool:
    return "norm" in site.producer


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")


def _means(pattern: str, module: str) -> bool:
    return pattern == ALL or fnmatchcase(module, pattern)


def _sites_among(modules: Collection[str]) -> list[Site]:
    """The sites of a model with these modules; a copy without its text part lacks one."""
    layers = {module.split(".")[1] for module in modules if module.startswith("layers.")}
    return [site for site in sites(len(layers)) if site.producer in modules]


def _refuse_unfoldable(
    patterns: Collection[str], known: Collection[Site], linears: Collection[str]
) -> None:
    foldable = {consumer for site in known for consumer in site.consumers}
    for pattern in patterns:
        named = [linear for linear in linears if _means(pattern, linear)]
        if any(linear in foldable for linear in named):
            continue
        reasons = ((n, why) for n in named for p, why in _NOT_FOLDABLE if fnmatchcase(n, p))
        module, reason = next(reasons, (pattern, "no linear has this name"))
        raise QuantOptionError(
            f"its input cannot be folded: {reason}",
            tensor=module,
            needed="attention.qkv, attention.o, feed_forward.w1, w2, w3 or llm_cond_proj",
        )
