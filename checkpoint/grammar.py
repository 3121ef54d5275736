"""Keys of Ideogram 4 files: ``prefix`` + ``module`` + ``suffix``, each from a table.

The three are independent of each other: any prefix meets any naming of modules and any storage, so
they are read with one grammar, and a new tool's file needs a row, not a branch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, CorruptFileError
from .canonical import is_linear
from .copy_names import CONDITIONAL, UNCONDITIONAL
from .entries import Entry
from .files import RawTensor
from .parts import NOT_SUPPORTED, Parts, instead_of, told
from .sdnq_config import SDNQ
from .suffixes import OTHER, SUFFIXES

# Prefix -> the copy that it names; None where it names none. sd.cpp's "uncond." stands inside the
# prefix that alone is the conditional copy.
PREFIXES: dict[str, str | None] = {
    "": None,
    "model.diffusion_model.": None,
    "diffusion_model.": None,
    "transformer.": None,
    "conditional.": CONDITIONAL,
    "unconditional.": UNCONDITIONAL,
    "cond.": CONDITIONAL,
    "uncond.": UNCONDITIONAL,
    "conditional_transformer.": CONDITIONAL,
    "unconditional_transformer.": UNCONDITIONAL,
    "model.diffusion_model.cond.": CONDITIONAL,
    "model.diffusion_model.uncond.": UNCONDITIONAL,
}

# Modules stored in pieces (diffusers): name -> (canonical name, number of the piece)
SPLIT_MODULES: dict[str, tuple[str, int]] = {
    "attention.to_q": ("attention.qkv", 0),
    "attention.to_k": ("attention.qkv", 1),
    "attention.to_v": ("attention.qkv", 2),
    "attention.to_out.0": ("attention.o", 0),
}
_PIECES = {"attention.qkv": ("to_q", "to_k", "to_v")}

MARKERS = ("scaled_fp8", "ideogram4_quant")  # tensors that only say how others are stored

_MODULE = re.compile(
    r"layers\.\d{1,4}\.(?:attention\.(?:qkv|o|to_q|to_k|to_v|to_out\.0|norm_q|norm_k)"
    r"|feed_forward\.w[123]|adaln_modulation|attention_norm[12]|ffn_norm[12])"
    r"|input_proj|llm_cond_norm|llm_cond_proj|t_embedding\.mlp_(?:in|out)|adaln_proj"
    r"|embed_image_indicator|final_layer\.(?:linear|adaln_modulation)"
)
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_PREFIX = "|".join(re.escape(prefix) for prefix in sorted(PREFIXES, key=len, reverse=True))
_KEY = re.compile(f"(?P<prefix>{_PREFIX})(?P<module>{_MODULE.pattern})\\.(?P<suffix>.+)", re.DOTALL)

_FOLD_KEY = re.compile(
    f"(?P<prefix>{_PREFIX})fold\\.(?P<module>{_MODULE.pattern})\\.(?P<kind>smooth|rotation)"
)


@dataclass(frozen=True)
class Key:
    """What a key of a file says: ``name`` is canonical, ``piece`` None for a whole tensor."""

    prefix: str
    name: str
    piece: int | None
    suffix: str

    @property
    def role(self) -> str | None:
        return role_of(self.suffix)


def role_of(suffix: str) -> str | None:
    """What the tensor is to its parameter: None for one not needed, OTHER for one not known."""
    return SUFFIXES[suffix][1] if suffix in SUFFIXES else OTHER


def parameter_of(suffix: str) -> str:
    """``weight`` or ``bias``: what a tensor of this suffix belongs to."""
    return SUFFIXES[suffix][0] if suffix in SUFFIXES else "weight"


def parse_key(key: str) -> Key | None:
    """The parts of a key under a module of Ideogram 4, or None if it is under none."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module, piece = match["module"], None
    layer = _LAYER.fullmatch(module)
    if layer is not None and layer[2] in SPLIT_MODULES:
        whole, number = SPLIT_MODULES[layer[2]]
        module = layer[1] + whole
        piece = number if whole in _PIECES else None
    name = f"{module}.{parameter_of(match['suffix'])}"
    return Key(match["prefix"], name, piece, match["suffix"])


def parse_fold_key(key: str) -> tuple[str, str, str] | None:
    """(prefix, module, ``smooth`` or ``rotation``) of a folded file's record, or None."""
    match = _FOLD_KEY.fullmatch(key)
    return None if match is None else (match["prefix"], match["module"], match["kind"])


@dataclass(frozen=True)
class Built:
    """``entries``: name -> entry. ``orphans``: tensors under a module that has no weight."""

    entries: dict[str, Entry]
    orphans: tuple[tuple[Key, RawTensor], ...] = ()

    def check(self) -> None:
        """CheckpointError, naming the tensor, for the first that is not understood."""
        for key, raw in self.orphans:
            raise not_supported(key, raw)
        for entry in self.entries.values():
            entry.check()


def build_entries(
    tensors: Collection[tuple[Key, RawTensor]],
    stated: Mapping[str, Mapping[str, Any]],
    is_linear: Callable[[str], bool] = is_linear,
) -> Built:
    """The entries of one model's tensors.

    ``stated`` is the quantization that the file's metadata tells, by module as the keys of the
    weights name it (``statements.matched``). Raises CorruptFileError for a tensor stored twice, a
    scale without its weight, q, k, v incomplete.
    """
    roles: dict[str, dict[int | None, dict[str, RawTensor]]] = {}
    others: dict[tuple[str, int | None], list[tuple[Key, RawTensor]]] = {}
    for key, raw in tensors:
        if key.role == OTHER:
            others.setdefault((key.name, key.piece), []).append((key, raw))
        if key.role in (None, OTHER):
            continue
        found = roles.setdefault(key.name, {}).setdefault(key.piece, {})
        if key.role in found:
            raise stored_twice(raw, found[key.role])
        found[key.role] = raw
    orphans = _take_orphans(roles, others)
    entries = {}
    for name, pieces in roles.items():
        beside = {p: tuple(raw for _, raw in others.get((name, p), ())) for p in pieces}
        entries[name] = _entry(name, pieces, beside, stated, is_linear(name))
    return Built(entries, orphans)


def _take_orphans(
    roles: dict[str, dict[int | None, dict[str, RawTensor]]],
    others: Mapping[tuple[str, int | None], Sequence[tuple[Key, RawTensor]]],
) -> tuple[tuple[Key, RawTensor], ...]:
    """What is not understood and has no weight beside it; its modules are taken out of ``roles``.

    So stores a format that has another name for the weight itself.
    """
    orphans: list[tuple[Key, RawTensor]] = []
    for (name, piece), beside in others.items():
        if "weight" not in roles.get(name, {}).get(piece, {}):
            orphans += beside
            roles.pop(name, None)
    return tuple(orphans)


def _entry(
    name: str,
    pieces: Mapping[int | None, Mapping[str, RawTensor]],
    beside: Mapping[int | None, tuple[RawTensor, ...]],
    stated: Mapping[str, Mapping[str, Any]],
    linear: bool,
) -> Entry:
    any_raw = next(iter(next(iter(pieces.values())).values()))
    numbers = set(pieces)
    if numbers not in ({None}, {0, 1, 2}):
        module = _LAYER.fullmatch(name.rpartition(".")[0])
        names = _PIECES[module[2]] if module else ()
        missing = [names[i] for i in range(len(names)) if i not in numbers]
        raise CorruptFileError(
            "the tensor is stored in pieces and not all are there, or whole as well",
            file=any_raw.file.path,
            tensor=any_raw.key,
            found=f"no {', '.join(missing)}" if missing else "both forms",
            needed=f"{', '.join(names)} or {name}",
        )
    dimensions = 2 if linear or "embed_" in name else 1
    parts = []
    for piece, roles in sorted(pieces.items(), key=lambda item: item[0] or 0):
        if "weight" not in roles:
            raise CorruptFileError(
                "a tensor without its weight",
                file=any_raw.file.path,
                tensor=next(iter(roles.values())).key,
                needed=name,
            )
        weight, others = _squeezed(roles["weight"], dimensions), beside[piece]
        described = stated.get(module_of(weight)) if name.endswith(".weight") else None
        if described is not None and described.get("format") == SDNQ:  # has its own suffixes
            roles = {**roles, **{raw.key.rpartition(".")[2]: raw for raw in others}}
            others = ()
        parts.append(Parts(weight.key, {**roles, "weight": weight}, described, others))
    return Entry(name, tuple(parts), linear)


def not_supported(key: Key, raw: RawTensor) -> CheckpointError:
    """The error for a tensor that stands for a weight in a way that is not understood."""
    found = told(raw, key.suffix)
    return CheckpointError(
        NOT_SUPPORTED, file=raw.file.path, tensor=raw.key, found=found, hint=instead_of(found)
    )


def stored_twice(raw: RawTensor, other: RawTensor) -> CorruptFileError:
    """The error for two tensors of one place in the model."""
    return CorruptFileError(
        "the tensor is stored twice",
        file=raw.file.path,
        tensor=raw.key,
        found=f"{other.key} too",
        hint="Which one the model was made with is unknown: use the file as its tool wrote it.",
    )


def module_of(weight: RawTensor) -> str:
    """The module whose weight this is, as the file's keys name it."""
    return weight.key.rpartition(".")[0]


def _squeezed(raw: RawTensor, dimensions: int) -> RawTensor:
    """Without the leading ones that some writers of GGUF add."""
    extra = max(0, len(raw.shape) - dimensions)
    if extra and all(size == 1 for size in raw.shape[:extra]):
        return dataclasses.replace(raw, shape=raw.shape[extra:])
    return raw
