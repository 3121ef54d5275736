"""Folded files: where a model can take a change of basis, how a file records it, how it is undone.

A folded file is for hosts without this pack: smoothing and rotations lie in its weights, and
``fold.<linear>.smooth`` (F32 [in_features]: the linear's input is divided by it) and
``fold.<linear>.rotation`` (I32 [1]: and then rotated in such groups) tell what was done. Readers of
this package undo it tensor by tensor, so that everything above them, LoRAs included, sees the
original model. Metadata ``lora_basis`` is
``folded``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CHECK_DOWNLOAD, CorruptFileError
from ..ops.fold import Fold
from ..ops.rotation import GROUPS
from .files import RawTensor
from .parts import same_vector

LORA_BASIS_KEYS = ("lora_basis", "ideogram4.lora_basis")
FOLDED = "folded"
"""Metadata keys (safetensors, GGUF) and value that mark a folded file."""

_THIRDS = 3


@dataclass(frozen=True)
class Site:
    """``producer`` makes the input of ``consumers`` and can take a factor of it into its rows.

    The producer is a norm or a linear; ``v_only``: those rows are the last third of a fused qkv.
    ``rotates``: a rotation within a head commutes with all that lies between.
    """

    producer: str
    consumers: tuple[str, ...]
    v_only: bool = False
    rotates: bool = False


_STEM_SITES = (Site("llm_cond_norm", ("llm_cond_proj",)),)
_LAYER_SITES = (
    Site("attention_norm1", ("attention.qkv",)),
    Site("attention.qkv", ("attention.o",), v_only=True, rotates=True),
    Site("ffn_norm1", ("feed_forward.w1", "feed_forward.w3")),
    Site("feed_forward.w3", ("feed_forward.w2",)),
)


def sites(num_layers: int) -> tuple[Site, ...]:
    """Every place of the model where a factor can be folded, in the order of computation."""
    layers = tuple(
        dataclasses.replace(
            site,
            producer=f"layers.{i}.{site.producer}",
            consumers=tuple(f"layers.{i}.{name}" for name in site.consumers),
        )
        for i in range(num_layers)
        for site in _LAYER_SITES
    )
    return _STEM_SITES + layers


@dataclass(frozen=True, eq=False)
class Folding:
    """What was folded into one copy: vectors and rotation groups by the linear whose input changed.

    ``smooth``: fp32 [in_features], positive. Every consumer of a site has the same vector.
    """

    smooth: Mapping[str, Tensor] = field(default_factory=dict)
    rotation: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.smooth or self.rotation)

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears whose input is divided or rotated by the weights before them."""
        return tuple(dict.fromkeys((*self.smooth, *self.rotation)))

    @cached_property
    def _sites(self) -> dict[str, Site]:
        """producer -> its site, for every site with something folded."""
        changed = self.smooth.keys() | self.rotation.keys()
        layers = [int(name.split(".")[1]) for name in changed if name.startswith("layers.")]
        found = sites(max(layers, default=-1) + 1)
        return {s.producer: s for s in found if not changed.isdisjoint(s.consumers)}

    def of(self, module: str, rows: int) -> Fold | None:
        """The change of basis at a linear or norm of ``rows`` outputs; None if there is none.

        A norm's weight counts as a column: ``fold.fold(weight[:, None])``.
        """
        smooth, rotation = self.smooth.get(module), self.rotation.get(module)
        site = self._sites.get(module)
        if site is None:
            changed = smooth is not None or rotation is not None
            return Fold(smooth, rotation) if changed else None
        consumer = site.consumers[0]
        vector, row_rotation = self.smooth.get(consumer), self.rotation.get(consumer)
        first_row = rows // _THIRDS * (_THIRDS - 1) if site.v_only else 0
        if vector is not None and first_row:
            vector = torch.cat((vector.new_ones(first_row), vector))
        return Fold(smooth, rotation, vector, row_rotation, first_row)

    def low_rank(self, module: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A LoRA pair of the original model as one of the folded weights, fp32.

        For a model that a stock loader has loaded from a folded file.
        """
        fold = self.of(module, up.shape[0])
        return (down, up) if fold is None else fold.fold_low_rank(down, up)


@dataclass(frozen=True, eq=False)
class StoredFolding:
    """A folding in a file: (linear, ``smooth`` or ``rotation``) -> stored tensor."""

    tensors: Mapping[tuple[str, str], RawTensor]

    @cached_property
    def folding(self) -> Folding:
        """Read and checked: a few MB. Raises CorruptFileError for what no writer leaves."""
        found = Folding(
            {m: self._vector(raw) for (m, kind), raw in self.tensors.items() if kind == "smooth"},
            {m: self._group(raw) for (m, kind), raw in self.tensors.items() if kind == "rotation"},
        )
        _check_sites(found, {module: raw for (module, _), raw in self.tensors.items()})
        return found

    def _vector(self, raw: RawTensor) -> Tensor:
        if raw.dtype not in ("F32", "F16", "BF16") or len(raw.shape) != 1:
            raise _corrupt(raw, "no vector of factors", f"{raw.dtype} {list(raw.shape)}", "F32 [K]")
        values = raw.read().float()
        if not bool((values.isfinite() & (values > 0) & (1 / values).isfinite()).all()):
            raise _corrupt(raw, "factors that cannot be divided by", "others", "positive numbers")
        return values

    def _group(self, raw: RawTensor) -> int:
        if raw.dtype != "I32" or raw.nbytes != 4:
            raise _corrupt(raw, "no rotation group", f"{raw.dtype} {list(raw.shape)}", "one I32")
        group = int(raw.read())
        if group not in GROUPS:
            raise _corrupt(raw, "unknown rotation group", group, f"one of {GROUPS}")
        return group


def _check_sites(found: Folding, stored: Mapping[str, RawTensor]) -> None:
    """CorruptFileError, naming the tensor, for a record that fits no site of the model."""
    site_of = {consumer: site for site in found._sites.values() for consumer in site.consumers}
    for module, raw in stored.items():
        site = site_of.get(module)
        if site is None:
            raise _corrupt(raw, "nothing can be folded there", module, "a norm or v before it")
        if module in found.rotation and not site.rotates:
            raise _corrupt(raw, "no weight can absorb a rotation there", module, "none")
        vectors = [found.smooth.get(consumer) for consumer in site.consumers]
        if any(not same_vector(vector, vectors[0]) for vector in vectors):
            raise _corrupt(raw, "differs from what shares its input", module, "one vector")


def _corrupt(raw: RawTensor, message: str, found: object, needed: object) -> CorruptFileError:
    return CorruptFileError(
        f"the record of what was folded: {message}",
        file=raw.file.path,
        tensor=raw.key,
        found=found,
        needed=needed,
        hint=CHECK_DOWNLOAD,
    )
