"""LoRA files for Ideogram 4, whatever trainer wrote them, as updates of the model's own weights."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from ...errors import CheckpointError, CorruptFileError, printable
from ..copies import CONDITIONAL
from ..origins import what_it_is
from ..tensor_files import open_tensor_files
from . import names as lora_names
from . import updates as lora_updates
from .changes import WeightChange
from .found import Found
from .kinds import ADAPTER, AS_STORED, Strength, refuse_other_kinds, strength_of
from .low_rank import LowRank, in_rows, stack
from .passed_over import refuse_passed_over

logger = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]
Changes = Mapping[str, Sequence[WeightChange]]
_PEFT_PREFIX = "base_model.model."
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LARGEST_CONFIG = 1 << 20
_NO_LORA = "this file holds no LoRA for Ideogram 4"
_ENOUGH = 4000  # names that are looked at: more than any LoRA has
_NONE: Shapes = MappingProxyType({})


@dataclass
class LoraFile:
    """What a file does, by copy (None where the file does not say), and what was not understood.

    updates: of linears, by their names, which a side path applies. changes: of weights and biases,
    by the parameters' names, which are no low-rank products. kinds: what the updates are, by copy.
    linears: how many there are in the model's blocks.
    """

    updates: dict[str | None, dict[str, LowRank]] = field(default_factory=dict)
    changes: dict[str | None, dict[str, list[WeightChange]]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    kinds: dict[str | None, set[str]] = field(default_factory=dict)
    linears: int = 0

    def for_copy(self, copy: str, apply_to: str) -> dict[str, LowRank]:
        """The updates of one copy: those that name it, and the unnamed ones if `apply_to` says so.

        apply_to: ``"as in the file"`` (unnamed means conditional), ``"conditional"``,
        ``"unconditional"`` or ``"both"``.
        """
        return self._of(self.updates, copy, apply_to)

    def changes_for_copy(self, copy: str, apply_to: str) -> dict[str, list[WeightChange]]:
        """The changes of one copy, chosen as by `for_copy`."""
        return self._of(self.changes, copy, apply_to)

    @staticmethod
    def _of(found: Mapping[str | None, dict], copy: str, apply_to: str) -> dict:
        if apply_to not in ("as in the file", "both", copy):
            return {}
        named = found.get(copy, {})
        everyone = apply_to != "as in the file" or copy == CONDITIONAL
        return {**(found.get(None, {}) if everyone else {}), **named}


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory: the file may change or vanish afterwards.

    Raises CorruptFileError, TruncatedFileError and CheckpointError (no safetensors file, no LoRA).
    """
    files = open_tensor_files(path)
    if files.kind != "safetensors":
        raise CheckpointError("a LoRA is read from safetensors files", file=path, found=files.kind)
    refuse_other_kinds(files.tensors, path.name)
    if not any(lora_names.part_of(name) for name in files.tensors):
        raise _no_lora(files.tensors, path)  # before a whole model is read
    return files.load()


def read_strength(path: Path) -> Strength:
    """The strength that a LoRA file's metadata states, for linears without alpha tensors.

    PEFT's own folders state it in ``adapter_config.json`` beside ``adapter_model.safetensors``; a
    warning where a file of PEFT's names has lost it.
    """
    files = open_tensor_files(path)
    metadata = dict(files.metadata)
    config = path.with_name(_PEFT_CONFIG)
    if path.name == _PEFT_FILE and ADAPTER not in metadata and config.is_file():
        if config.stat().st_size > _LARGEST_CONFIG:
            raise CorruptFileError(
                "it is too large for a LoRA's configuration",
                file=config,
                found=f"{config.stat().st_size} bytes",
                needed=f"at most {_LARGEST_CONFIG}",
            )
        metadata[ADAPTER] = config.read_text(encoding="utf-8", errors="replace")
    elif ADAPTER not in metadata and _is_pefts_alone(files.tensors):
        logger.warning(
            "%s: PEFT writes a LoRA's alpha into %s, which is read beside %s alone: it is taken at "
            "full strength. If its alpha is not its rank, set strength to alpha / rank",
            path.name,
            _PEFT_CONFIG,
            _PEFT_FILE,
        )
    return strength_of(metadata, path.name)


def _is_pefts_alone(names: Iterable[str]) -> bool:
    """Whether tensors have PEFT's names, and none says a strength."""
    names = list(names)
    return any(name.startswith(_PEFT_PREFIX) for name in names) and not any(
        name.endswith(".alpha") for name in names
    )


def parse_lora(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    file: str,
    strength: Strength = AS_STORED,
    others: Shapes = _NONE,
) -> LoraFile:
    """Sorts a file's tensors by copy and linear; split q, k and v become parts of qkv.

    shapes: the model's linears, name -> (N, K). strength: what the file's metadata states, for
    linears without an alpha tensor. others: the model's parameters that are no linear's weight,
    such as biases and norms, name -> shape. CheckpointError if nothing fits this model or the
    file is of a kind that is not supported, CorruptFileError for parts without each other, of a
    wrong shape or not finite.
    """
    refuse_other_kinds(state, file)
    no_linears = {n.removesuffix(".weight"): s for n, s in others.items() if n.endswith(".weight")}
    known = lora_names.spellings((*shapes, *no_linears))
    result = LoraFile(linears=sum(name.startswith("layers.") for name in shapes))
    thirds: dict[tuple[str | None, str], set[int | None]] = {}
    low_rank: dict[tuple[str | None, str], list[LowRank]] = {}
    modules = _modules(state, known, file, strength, result.unknown)
    refuse_passed_over(state, result.unknown, known, file)
    for (copy, module), found in modules.items():
        linear, third = lora_names.fused(module)
        changes = result.changes.setdefault(copy, {})
        if linear not in shapes:
            change = lora_updates.vector_of(found, no_linears[linear])
        else:
            (n, k), rows = shapes[linear], shapes[linear][0]
            if third is not None:
                rows = n // lora_names.THIRDS
            first = None if third is None else third * rows
            change = lora_updates.update_of(found, rows, k, first)
            if change is not None:
                _once(thirds.setdefault((copy, linear), set()), third, linear, file)
            if isinstance(change, LowRank):
                part = change if first is None else in_rows(change, first, n)
                low_rank.setdefault((copy, linear), []).append(part)
                result.kinds.setdefault(copy, set()).add(_family(found))
        if isinstance(change, WeightChange):
            changes.setdefault(f"{linear}.weight", []).append(change)
        _add_bias(changes, found, linear, others)
    for (copy, linear), found in low_rank.items():
        result.updates.setdefault(copy, {})[linear] = stack((update, 1.0) for update in found)
    result.changes = {copy: changes for copy, changes in result.changes.items() if changes}
    if not result.updates and not result.changes:
        raise _no_lora(state, file)
    if strength.dora and not any("magnitude" in found.parts for found in modules.values()):
        raise CorruptFileError(
            "its metadata says that it is a DoRA, but it has no magnitudes",
            file=file,
            needed="lora_magnitude_vector beside lora_A and lora_B",
            hint="Export it again with the magnitudes.",
        )
    return result


def refuse_changes(found: LoraFile, file: str, why: str, hint: str) -> None:
    """CheckpointError for a file that changes weights, where only side paths are possible."""
    if found.changes:
        raise CheckpointError(
            f"this LoRA changes the weights themselves, {why}",
            file=file,
            found=describe(found),
            needed="a LoRA, or a small LoKr or LoHa, which act beside the weights",
            hint=hint,
        )


def _modules(
    state: Mapping[str, Tensor],
    known: Mapping[str, str],
    file: str,
    strength: Strength,
    unknown: list[str],
) -> dict[tuple[str | None, str], Found]:
    """The tensors by (copy, module), in the file's order but q before k before v."""
    parts: dict[tuple[str | None, str], dict[str, tuple[str, Tensor]]] = {}
    spelled: dict[tuple[str | None, str], str] = {}
    for name, tensor in state.items():
        place = lora_names.locate(name, known)
        if place is None:
            unknown.append(name)
            continue
        found = parts.setdefault((place.copy, place.module), {})
        if place.part in found:
            raise CorruptFileError(
                f"its {place.part} half is stored twice, under two names", file=file, tensor=name
            )
        found[place.part] = (name, tensor)
        spelled[place.copy, place.module] = place.spelled
    order = sorted(parts, key=lambda place: lora_names.fused(place[1])[1] or 0)
    return {p: Found(file, p[1], spelled[p], parts[p], strength) for p in order}


def _once(seen: set[int | None], third: int | None, linear: str, file: str) -> None:
    """Notes that a linear, or a third of its rows, is changed; CheckpointError for both."""
    seen.add(third)
    if None in seen and len(seen) > 1:
        raise CheckpointError(
            "this linear is stored fused and split at once, which would add both",
            file=file,
            tensor=linear,
            needed="qkv, or to_q, to_k and to_v",
            hint="Remove one of the two from the file.",
        )


def _add_bias(
    changes: dict[str, list[WeightChange]], found: Found, linear: str, others: Shapes
) -> None:
    name = f"{linear}.bias"
    change = lora_updates.bias_of(found, others.get(name, (0,))[0])
    if change is not None:
        changes.setdefault(name, []).append(change)


def _no_lora(names: Iterable[str], file: str | Path) -> CheckpointError:
    names = list(names)
    if not any(map(lora_names.part_of, names[:_ENOUGH])) and (kind := what_it_is(names)):
        return CheckpointError(_NO_LORA, file=file, found=kind, hint="Pick a file of a LoRA.")
    other = lora_names.other_model(names)
    return CheckpointError(
        _NO_LORA,
        file=file,
        found=", ".join(names[:3]) or "no tensors",
        needed="lora_A and lora_B, or lora_down and lora_up, of layers.N...",
        hint="It may be a LoRA of another model."
        if other is None
        else f"Its names are those of a LoRA for {other}.",
    )


def _family(found: Found) -> str:
    """What trainers call a low-rank product of these parts."""
    starts = {"lokr": "LoKr", "hada": "LoHa"}
    return next((k for s, k in starts.items() if any(p.startswith(s) for p in found.parts)), "LoRA")


def describe(file: LoraFile, apply_to: str = "as in the file") -> str:
    """What was understood, for the report. apply_to: as in `LoraFile.for_copy`."""
    lines = []
    for copy in dict.fromkeys((*file.updates, *file.changes)):
        where, told = _where(copy, apply_to), []
        updates, changes = file.updates.get(copy), file.changes.get(copy)
        if updates:
            ranks = sorted({u.rank for u in updates.values()})
            shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            kind = " and ".join(sorted(file.kinds.get(copy, ())))
            among = sum(name.startswith("layers.") for name in updates)
            beside = len(updates) - among
            more = f" and {beside} outside its blocks" if beside else ""
            told.append(f"{kind}: {among} of {file.linears} linears of {where}{more}, rank {shown}")
        if changes:
            of = "" if updates else f" of {where}"
            told.append(f"baked into the weights, {_counted(changes)}{of}")
        lines.append("; ".join(told))
    if file.unknown:
        kinds = sorted({re.sub(r"\d+", "N", name) for name in file.unknown})
        lines.append(f"not loaded: {len(file.unknown)} tensors, such as {printable(kinds[0])}")
    return "\n".join(lines)


def _where(copy: str | None, apply_to: str) -> str:
    if copy is None and apply_to == "both":
        return "both copies"
    if copy is None and apply_to == "as in the file":
        return f"the {CONDITIONAL} copy"
    return f"the {copy or apply_to} copy"


def _counted(changes: Changes) -> str:
    """How many weights of which kind are changed."""
    linears, others = Counter(), Counter()
    for name, found in changes.items():
        if name.endswith(".bias"):
            others["biases"] += 1
        elif "norm" in name:
            others["norms"] += 1
        else:
            linears[" and ".join(dict.fromkeys(change.name for change in found))] += 1
    told = [f"{sum(linears.values())} linears ({', '.join(linears)})"] if linears else []
    return ", ".join((*told, *(f"{count} {kind}" for kind, count in others.items())))
