"""Which tensor is stored how: decided from names and shapes alone, before a weight is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..checkpoint.canonical import is_linear
from ..ops.blocks import FORMATS
from .block_types import block_types
from .choose import Choice, Linear, check_choice_options, choose, int8_choices
from .encodings import Blocks, Encoding, NativeInt8, Shape, SmoothInt8, Unquantized, stored_bytes
from .errors import QuantOptionError
from .input_moments import InputMoments
from .int4_encoding import MULTIPLE as INT4_MULTIPLE
from .int4_encoding import ConvrotInt4
from .packed_encoding import PackedInt8
from .recipes import (
    BLOCK_LINEARS,
    CONTAINERS,
    MIXED,
    NATIVE_TYPES,
    PACKED_BITS,
    PACKED_GROUP,
    READ_ONLY,
    QuantOptions,
    Recipe,
    matches,
)
from .storage import INT8, PACKED_MULTIPLE, UNQUANTIZED, storage_encoding
from .treatments import ROTATION, rotation_group


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor and its encoding.

    ``linear``: the weight of a linear layer; ``quantized``: one that the recipe applies to;
    ``protected``: left in bf16 because a pattern of ``QuantOptions.protect`` or the calibration
    says so; ``choice``: what the calibration chose and why, if it was asked; ``inputs``: what it
    knows of the linear's inputs, as they reach the stored weight, with which ``feedback`` rounds.
    """

    copy: str
    name: str
    shape: Shape
    encoding: Encoding
    linear: bool
    quantized: bool = False
    protected: bool = False
    choice: Choice | None = None
    inputs: InputMoments | None = None
    feedback: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.encoding, self.shape)


def container_of(recipe: Recipe, options: QuantOptions) -> str:
    """``native``, ``transformer-lab`` or ``gguf``; QuantOptionError for options against it."""
    if options.container not in CONTAINERS:
        raise QuantOptionError(
            "unknown container", found=options.container, needed=f"one of {CONTAINERS}"
        )
    if options.linears not in (None, "blocks", "all"):
        raise QuantOptionError("unknown linears", found=options.linears, needed="blocks or all")
    if recipe.file_format == "gguf":
        if options.container != "native":
            raise QuantOptionError(f"{recipe.level} is a GGUF type", found=options.container)
        container = "gguf"
    else:
        container = options.container
    if container == "transformer-lab" and recipe.rotation is not None:
        raise QuantOptionError(
            "Transformer Lab's container cannot say that a weight is rotated",
            hint="Use the level INT8 W8A8, or the native container.",
        )
    if options.smooth is not None and recipe.weight_type != "INT8":
        raise QuantOptionError(
            f"the {container if container == 'gguf' else recipe.level} container cannot carry "
            "smoothing vectors",
            hint="Use an INT8 level.",
        )
    if options.types and container != "gguf":
        raise QuantOptionError(
            "types of single linears are for GGUF levels",
            found=recipe.level,
            hint="To keep a linear in bf16 use protect.",
        )
    written = [qtype for qtype in FORMATS if qtype not in READ_ONLY]
    for rule in options.types:
        if rule.qtype not in written:
            raise QuantOptionError(
                "unknown GGUF type, or one that is read only",
                found=rule.qtype,
                needed="one of " + ", ".join(written),
            )
    return container


def plan_tensors(
    recipe: Recipe, options: QuantOptions, shapes: Mapping[str, Mapping[str, Shape]]
) -> list[TensorPlan]:
    """``shapes``: copy -> canonical tensor name -> shape. In that order, one plan a stored tensor.

    Raises QuantOptionError for options that contradict each other, for a pattern that matches no
    linear, and for a smoothing vector of the wrong size.
    """
    container = container_of(recipe, options)
    if (options.storage is None) == (recipe.level in MIXED):
        raise QuantOptionError(
            "a mixed level and the storage of each linear go together, as a target size chooses it",
            found=recipe.level,
        )
    check_choice_options(recipe, options)
    _check_patterns(options, shapes)
    targets = targets_of(container, options, shapes)
    mixed = options.storage
    if mixed is None:
        choices = choose(recipe, container, options, targets)
    else:
        choices = int8_choices(container, options, _stored_as(INT8, mixed, targets))
    types = block_types(recipe, options, targets) if container == "gguf" and mixed is None else {}
    plans = []
    for copy, tensors in shapes.items():
        for name, shape in tensors.items():
            module, _, suffix = name.rpartition(".")
            linear = is_linear(name)
            choice = choices.get((copy, module)) if linear else None
            kept = choice is not None and choice.treatment is None
            quantized = linear and (copy, module) in targets and not kept
            if quantized and mixed is not None:
                quantized = mixed[f"{copy}.{module}"] != UNQUANTIZED
            protected = kept or (linear and any(matches(p, copy, module) for p in options.protect))
            if quantized and mixed is not None:
                name_of = mixed[f"{copy}.{module}"]
                encoding = storage_encoding(name_of, container, tuple(shape), choice)
            elif quantized and recipe.weight_type == "INT8":
                encoding = _int8(container, recipe, options, choice, (copy, module), shape)
            elif quantized and recipe.weight_type in NATIVE_TYPES:
                encoding = _packed(recipe.type_of(module), shape, recipe.rotation or ROTATION)
            elif quantized:
                encoding = Blocks(types[copy, module], shape)
            elif container == "gguf":
                encoding = _unquantized_blocks(suffix, shape, linear)
            elif container == "transformer-lab" and not linear and suffix != "bias":
                continue  # that container holds linears alone
            else:
                encoding = Unquantized(torch.bfloat16, suffix)
            plan = TensorPlan(
                copy, name, tuple(shape), encoding, linear, quantized, protected, choice
            )
            if linear and options.calibration is not None:
                stats = options.calibration.layer(copy, module)
                inputs = None if stats is None else stats.moments
                plan = replace(plan, inputs=inputs, feedback=rounding_of(options) == "feedback")
            plans.append(plan)
    return plans


def targets_of(
    container: str, options: QuantOptions, shapes: Mapping[str, Mapping[str, Shape]]
) -> dict[Linear, Shape]:
    """The linears that the recipe applies to, without those that a pattern protects."""
    chosen = options.linears or ("all" if container == "transformer-lab" else "blocks")
    targets = {}
    for copy, tensors in shapes.items():
        for name, shape in tensors.items():
            module = name.rpartition(".")[0]
            wanted = is_linear(name) and (chosen == "all" or fnmatchcase(module, BLOCK_LINEARS))
            if wanted and not any(matches(p, copy, module) for p in options.protect):
                targets[copy, module] = tuple(shape)
    return targets


def _stored_as(
    name: str, storage: Mapping[str, str], targets: Mapping[Linear, Shape]
) -> dict[Linear, Shape]:
    return {
        (copy, module): shape
        for (copy, module), shape in targets.items()
        if storage[f"{copy}.{module}"] == name
    }


def _int8(
    container: str,
    recipe: Recipe,
    options: QuantOptions,
    choice: Choice | None,
    linear: Linear,
    shape: Shape,
) -> Encoding:
    smooth = _smooth_of(options.smooth, *linear, shape)
    rotated = recipe.rotation is not None
    if choice is not None:
        rotated = choice.treatment.rotated
        smooth = choice.smooth if smooth is None else smooth
    if container == "transformer-lab":
        return SmoothInt8(smooth)
    group = rotation_group(shape[1], recipe.rotation or ROTATION) if rotated else None
    return NativeInt8(group, smooth, dense=choice is not None and choice.dense)


def _packed(weight_type: str, shape: Shape, limit: int) -> Encoding:
    """W4A8, W6A8 or W4A4, rotated in groups of up to ``limit``; bf16 for rows that hold no whole
    groups of a rotation, or of the type's own."""
    rotation = rotation_group(shape[1], limit)
    multiple = INT4_MULTIPLE if weight_type == "W4A4" else PACKED_MULTIPLE
    if rotation is None or shape[1] % multiple:
        return Unquantized(torch.bfloat16)
    if weight_type == "W4A4":
        return ConvrotInt4(rotation)
    return PackedInt8(PACKED_BITS[weight_type], PACKED_GROUP, rotation)


def rounding_of(options: QuantOptions) -> str:
    """The rounding that the calibration allows: inputs of one step say too little of the others."""
    calibration = options.calibration
    enough = calibration is not None and len(calibration.times) > 1
    return options.rounding if enough else "nearest"


def rounding_notes(options: QuantOptions) -> list[str]:
    """What the user should know of the rounding."""
    if options.calibration is None or rounding_of(options) == options.rounding:
        return []
    return [
        "codes are rounded to nearest, each on its own: the calibration watched a single step, and "
        "inputs of the others differ; calibrate with all steps for error feedback"
    ]


def _unquantized_blocks(suffix: str, shape: Shape, linear: bool) -> Blocks:
    """Linears in bf16; norms, biases and the embedding are small, and every reader takes F32."""
    return Blocks("BF16" if linear else "F32", shape, suffix)


def _smooth_of(
    smooth: Mapping[str, Tensor] | None, copy: str, module: str, shape: Shape
) -> Tensor | None:
    vector = (smooth or {}).get(f"{copy}.{module}", (smooth or {}).get(module))
    if vector is None:
        return None
    if tuple(vector.shape) != (shape[1],):
        raise QuantOptionError(
            "smoothing vector of another size",
            tensor=module,
            found=list(vector.shape),
            needed=[shape[1]],
        )
    if not bool((vector.isfinite() & (vector > 0)).all()):
        raise QuantOptionError("a smoothing vector must be positive and finite", tensor=module)
    return vector


def _check_patterns(options: QuantOptions, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
    """Every pattern must mean some linear: a misspelt one would leave a layer unprotected."""
    modules = [
        (copy, name.rpartition(".")[0])
        for copy, tensors in shapes.items()
        for name in tensors
        if is_linear(name)
    ]
    wanted = [*options.protect, *(rule.pattern for rule in options.types), *(options.smooth or {})]
    for pattern in wanted:
        if not any(matches(pattern, copy, module) for copy, module in modules):
            near = difflib.get_close_matches(pattern, dict.fromkeys(m for _, m in modules), 1, 0)
            raise QuantOptionError(
                "no linear has this name",
                tensor=pattern,
                hint=f"The nearest is {near[0]}." if near else None,
            )


def rotation_notes(recipe: Recipe, plans: Sequence[TensorPlan]) -> list[str]:
    """One line for each row length that could not be rotated in groups of the recipe's size."""
    if recipe.rotation is None:
        return []
    short: dict[int, list[TensorPlan]] = {}
    for plan in plans:
        group = rotation_group(plan.shape[-1], recipe.rotation)
        if (
            isinstance(plan.encoding, NativeInt8 | PackedInt8 | ConvrotInt4)
            and group != recipe.rotation
        ):
            short.setdefault(plan.shape[1], []).append(plan)
    notes = []
    for width, found in short.items():
        group = rotation_group(width, recipe.rotation)
        how = "not rotated" if group is None else f"rotated in groups of {group}"
        notes.append(
            f"{len(found)} linears with {width} inputs are {how}, not {recipe.rotation}: "
            f"{width} is no multiple of it ({found[0].name}, ...)"
        )
    return notes


def planned_bytes(plans: Sequence[TensorPlan]) -> int:
    """Bytes of tensor data that the plans will write."""
    return sum(plan.nbytes for plan in plans)
