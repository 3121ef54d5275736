"""LoRA files for Ideogram 4, whatever trainer wrote them, as low-rank updates of fused linears."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.copies import CONDITIONAL, UNCONDITIONAL
from ..checkpoint.tensor_files import open_tensor_files
from ..errors import CheckpointError, CorruptFileError, printable
from .lora_kinds import AS_STORED, Strength, refuse_other_kinds, strength_of
from .lora_passed_over import refuse_passed_over, told_beside

# prefix -> the copy that it names; None: the file does not say
_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("unconditional_transformer.", UNCONDITIONAL),
    ("conditional_transformer.", CONDITIONAL),
    ("base_model.model.", None),
    ("model.diffusion_model.", None),
    ("diffusion_model.", None),
    ("transformer.", None),
    ("lora_transformer_", None),
    ("lora_unet_", None),
)
_SUFFIXES = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
}
_ENDINGS = tuple(f".{suffix}" for suffix in _SUFFIXES)
# a split name -> (the fused linear, which third of its rows)
_SPLIT = {"to_q": ("qkv", 0), "to_k": ("qkv", 1), "to_v": ("qkv", 2)}
_THIRDS = 3
_NOTHING = torch.empty(())


@dataclass(frozen=True)
class LowRank:
    """An update of one linear: ``W + up @ down``; up [N, r] carries alpha / r."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]


@dataclass
class LoraFile:
    """copy (None where the file does not say) -> linear -> update; and what was not understood."""

    updates: dict[str | None, dict[str, LowRank]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def for_copy(self, copy: str, apply_to: str) -> dict[str, LowRank]:
        """The updates of one copy: those that name it, and the unnamed ones if `apply_to` says so.

        apply_to: ``"as in the file"`` (unnamed means conditional), ``"conditional"``,
        ``"unconditional"`` or ``"both"``.
        """
        if apply_to not in ("as in the file", "both", copy):
            return {}
        named = self.updates.get(copy, {})
        everyone = apply_to != "as in the file" or copy == CONDITIONAL
        return {**(self.updates.get(None, {}) if everyone else {}), **named}


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory: the file may change or vanish afterwards.

    Raises CorruptFileError, TruncatedFileError and CheckpointError (no safetensors file, no LoRA).
    """
    files = open_tensor_files(path)
    if files.kind != "safetensors":
        raise CheckpointError("a LoRA is read from safetensors files", file=path, found=files.kind)
    refuse_other_kinds(files.tensors, path.name)
    if not any(name.endswith(_ENDINGS) for name in files.tensors):
        raise _no_lora(files.tensors, path)  # before a whole model is read
    return files.load()


def read_strength(path: Path) -> Strength:
    """The strength that a LoRA file's metadata, or PEFT's config beside it, states.

    It is that of linears without alpha tensors.
    """
    return strength_of(open_tensor_files(path).metadata, path.name, told_beside(path))


def parse_lora(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    file: str,
    strength: Strength = AS_STORED,
) -> LoraFile:
    """Sorts a file's tensors by copy and linear; split q, k and v become one update of qkv.

    shapes: the model's linears, name -> (N, K). strength: what the file's metadata states, for
    linears without an alpha tensor. CheckpointError if nothing fits this model or the file is more
    than a plain LoRA (DoRA, LoKr, LoHa, OFT, .diff ...), CorruptFileError for halves
    without each other or of the wrong shape.
    """
    known = _spellings(shapes)
    parts: dict[tuple[str | None, str], dict[str, Tensor]] = {}
    result = LoraFile()
    refuse_other_kinds(state, file)
    names: dict[tuple[str | None, str], str] = {}
    for name, tensor in state.items():
        place = _locate(name, known)
        if place is None:
            result.unknown.append(name)
            continue
        copy, module, kind = place
        found = parts.setdefault((copy, module), {})
        if kind in found:
            raise CorruptFileError(
                f"its {kind} half is stored twice, under two names", file=file, tensor=name
            )
        found[kind] = tensor
        names[copy, module] = name
    refuse_passed_over(state, result.unknown, known, file)
    pieces: dict[tuple[str | None, str], dict[int | None, LowRank]] = {}
    for (copy, module), found in parts.items():
        fused, third = _fused(module)
        n, k = shapes[fused]
        rows = n if third is None else n // _THIRDS
        if "alpha" not in found and found.get("down", _NOTHING).ndim:
            rank = len(found["down"])
            spelled = (module, names[copy, module].rpartition(".lora")[0])
            found["alpha"] = torch.tensor(strength.scale(spelled, max(rank, 1)) * rank)
        pieces.setdefault((copy, fused), {})[third] = _low_rank(found, module, (rows, k), file)
    for (copy, fused), found in pieces.items():
        if None in found and len(found) > 1:
            raise CheckpointError(
                "this linear is stored fused and split at once, which would add both",
                file=file,
                tensor=fused,
                needed="qkv, or to_q, to_k and to_v",
                hint="Remove one of the two from the file.",
            )
        result.updates.setdefault(copy, {})[fused] = _fuse(found, shapes[fused][0])
    if not result.updates:
        raise _no_lora(state, file)
    return result


def _no_lora(names: Iterable[str], file: str | Path) -> CheckpointError:
    return CheckpointError(
        "this file holds no LoRA for Ideogram 4",
        file=file,
        found=", ".join(list(names)[:3]) or "no tensors",
        needed="lora_A and lora_B, or lora_down and lora_up, of layers.N...",
        hint="It may be a LoRA of another model.",
    )


def stack(updates: Iterable[tuple[LowRank, float]]) -> LowRank:
    """Several updates of one linear, with their strengths, as one of the summed rank."""
    updates = list(updates)
    down = torch.cat([u.down for u, _ in updates])
    up = torch.cat([u.up * strength for u, strength in updates], dim=1)
    return LowRank(down, up)


def _spellings(shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Every way to write a linear's name -> the name with dots, split ones included."""
    names = []
    for module in shapes:
        names.append((module, module))
        if module.endswith(".qkv"):
            names += [(split := module.removesuffix("qkv") + part, split) for part in _SPLIT]
        if module.endswith("attention.o"):
            names += [(module.removesuffix("o") + part, module) for part in ("to_out.0", "to_out")]
    return {written: module for name, module in names for written in (name, name.replace(".", "_"))}


def _locate(name: str, known: Mapping[str, str]) -> tuple[str | None, str, str] | None:
    """A tensor's name -> (copy, linear, which part), or None."""
    ending = next((s for s in _SUFFIXES if name.endswith("." + s)), None)
    if ending is None:
        return None
    module, copy = name.removesuffix("." + ending), None
    while (prefix := next((p for p in _PREFIXES if module.startswith(p[0])), None)) is not None:
        module = module.removeprefix(prefix[0])
        copy = prefix[1] or copy
    module = known.get(module)
    return None if module is None else (copy, module, _SUFFIXES[ending])


def _fused(module: str) -> tuple[str, int | None]:
    stem, _, last = module.rpartition(".")
    if last in _SPLIT:
        fused, third = _SPLIT[last]
        return f"{stem}.{fused}", third
    return module, None


def _low_rank(
    found: Mapping[str, Tensor], module: str, shape: tuple[int, int], file: str
) -> LowRank:
    for half in ("down", "up"):
        if half not in found:
            raise CorruptFileError(
                "one half of a LoRA pair is missing", file=file, tensor=module, needed=half
            )
    down, up = found["down"].float(), found["up"].float()
    rank = len(down) if down.ndim else 0
    if down.ndim and rank == 0:
        raise CorruptFileError(
            "the LoRA has rank 0 here, so it changes nothing",
            file=file,
            tensor=module,
            found=tuple(down.shape),
            needed="rank 1 or more",
        )
    for half, tensor, needed in (("down", down, (rank, shape[1])), ("up", up, (shape[0], rank))):
        if tuple(tensor.shape) != needed or rank == 0:
            raise CorruptFileError(
                f"the LoRA does not fit this model: its {half} half has another shape",
                file=file,
                tensor=module,
                found=tuple(tensor.shape),
                needed=needed,
                hint="It was trained for a model of another size.",
            )
    alpha = found.get("alpha", torch.tensor(float(rank))).float()
    up = up * (alpha / rank) if alpha.numel() == 1 else alpha
    if up.shape != found["up"].shape or not (up.isfinite().all() and down.isfinite().all()):
        raise CorruptFileError(
            "the LoRA holds NaN or infinity, or an alpha that is no number",
            file=file,
            tensor=module,
            found=f"alpha {alpha.tolist() if alpha.numel() < 2 else list(alpha.shape)}",
        )
    return LowRank(down, up)


def _fuse(found: Mapping[int | None, LowRank], rows: int) -> LowRank:
    """Thirds on their own rows of the fused linear, side by side in rank."""
    updates = []
    for third, update in sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0]):
        if third is None:
            updates.append((update, 1.0))
            continue
        up = update.up.new_zeros(rows, update.rank)
        start = rows // _THIRDS * third
        up[start : start + rows // _THIRDS] = update.up
        updates.append((LowRank(update.down, up), 1.0))
    return stack(updates)


def describe(file: LoraFile) -> str:
    """What was understood, for the report."""
    lines = []
    for copy, updates in file.updates.items():
        ranks = sorted({u.rank for u in updates.values()})
        said = copy or "copy not named"
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(f"{said}: {len(updates)} linears, rank {shown}")
    if file.unknown:
        kinds = sorted({re.sub(r"\d+", "N", name) for name in file.unknown})
        lines.append(f"not loaded: {len(file.unknown)} tensors, such as {printable(kinds[0])}")
    return "\n".join(lines)
