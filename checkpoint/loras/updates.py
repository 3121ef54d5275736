"""The tensors of one module in a LoRA file -> what is done to its weight and bias, checked.

Words for what does not fit name the file's tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import CheckpointError, CorruptFileError
from .changes import WeightChange, block_size
from .found import Found
from .low_rank import LowRank

LARGEST_SIDE_PATH = 128  # rank up to which a LoHa or LoKr is a side path: 0.7 GB on the real model
_ALONE = ("oft_blocks", "oft_R", "boft_R", "diff", "w_norm", "set_weight")
_BIASES = ("diff_b", "b_norm", "lora_bias")
Weight = tuple[str, dict[str, Tensor], float]  # kind, tensors, scale
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def update_of(found: Found, rows: int, k: int, first: int | None) -> LowRank | WeightChange | None:
    """What is done to ``rows`` x ``k`` of a linear's weight; None: nothing (a bias alone).

    first: the first of these rows where they are some of a fused linear's. CorruptFileError and
    CheckpointError for parts that do not fit this linear or each other.
    """
    kind, tensors, scale = _weight(found, rows, k)
    if kind is None:
        return None
    if "magnitude" in found.parts:
        if kind not in ("lora", "loha", "lokr"):
            raise _two_kinds(found, f"a DoRA of {kind}")
        magnitude = found.tensor("magnitude", (rows,), (rows, 1), (1, k))
    else:
        magnitude = None
        small = _low_rank(kind, tensors, scale)
        if small is not None:
            return small
    whole = first is None
    return WeightChange(kind, tensors, scale, first or 0, None if whole else rows, magnitude)


def bias_of(found: Found, rows: int) -> WeightChange | None:
    """What is done to a bias of ``rows``, if anything; CheckpointError where rows is 0: no bias."""
    parts = [part for part in _BIASES if part in found.parts]
    if len(parts) > 1:
        raise _two_kinds(found, " and ".join(parts))
    if not parts:
        return None
    if not rows:
        raise CheckpointError(
            "a change of a bias that this model does not have",
            file=found.file,
            tensor=found.parts[parts[0]][0],
            found=f"no bias at {found.module}",
        )
    scale = 1.0
    if parts == ["lora_bias"]:
        scale = found.scale(len(found.tensor("down")))
    return WeightChange("diff", {"diff": found.tensor(parts[0], (rows,), (rows, 1))}, scale)


def vector_of(found: Found, shape: tuple[int, ...]) -> WeightChange | None:
    """What is done to a parameter that is no linear's, such as a norm's weight."""
    allowed = {"diff": "diff", "w_norm": "diff", "set_weight": "set"}
    parts = [part for part in found.parts if part not in _BIASES and part != "alpha"]
    if not parts:
        return None
    if len(parts) > 1 or parts[0] not in allowed:
        raise CheckpointError(
            "only whole changes (.diff, .w_norm) are possible of what is no linear",
            file=found.file,
            tensor=found.parts[parts[0]][0],
        )
    kind = allowed[parts[0]]
    name = "set_weight" if kind == "set" else "diff"
    shapes = (shape, (*shape, 1)) if len(shape) == 1 else (shape,)
    return WeightChange(kind, {name: found.tensor(parts[0], *shapes)})


def _weight(found: Found, rows: int, k: int) -> tuple[str | None, dict[str, Tensor], float]:
    """The kind, its tensors and its scale; None for a module whose bias alone is changed."""
    has = [part for part in found.parts if part not in _BIASES]
    families = [name for name in _ALONE if name in has]
    families += [start for start in ("hada", "lokr") if any(p.startswith(start) for p in has)]
    families += ["lora"] if {"down", "up"} & set(has) else []
    if len(families) > 1:
        raise _two_kinds(found, " and ".join(families))
    if not families:
        if {"magnitude", "rescale", "boft_s"} & set(has) or (
            "alpha" in has and len(has) == len(found.parts)
        ):
            found.tensor("down")  # says that it is missing
        return None, {}, 1.0
    return _FAMILIES[families[0]](found, rows, k)


def _lora(found: Found, rows: int, k: int) -> Weight:
    for half in ("down", "up"):
        if half not in found.parts:
            raise CorruptFileError(
                "one half of a LoRA pair is missing",
                file=found.file,
                tensor=found.module,
                needed=half,
            )
    down, up = (found.parts[half][1] for half in ("down", "up"))
    rank = len(down) if down.ndim else 0
    if down.ndim and rank == 0:
        raise CorruptFileError(
            "the LoRA has rank 0 here, so it changes nothing",
            file=found.file,
            tensor=found.module,
            found=tuple(down.shape),
            needed="rank 1 or more",
        )
    for half, tensor, needed in (("down", down, (rank, k)), ("up", up, (rows, rank))):
        if tuple(tensor.shape) != needed or rank == 0:
            raise CorruptFileError(
                f"the LoRA does not fit this model: its {half} half has another shape",
                file=found.file,
                tensor=found.module,
                found=tuple(tensor.shape),
                needed=needed,
                hint="It was trained for a model of another size.",
            )
    tensors = {"down": found.tensor("down"), "up": found.tensor("up")}
    return "lora", tensors, found.scale(rank)


def _loha(found: Found, rows: int, k: int) -> Weight:
    tensors = {part: found.tensor(part) for part in _LOHA}
    for one in ("hada_w1", "hada_w2"):
        rank = tensors[f"{one}_b"].shape[0] if tensors[f"{one}_b"].ndim else 0
        _product(found, one, rank, rows, k)
    return "loha", tensors, found.scale(tensors["hada_w1_b"].shape[0])


def _product(found: Found, name: str, rank: int, rows: int, k: int) -> None:
    """Checks that ``name_a [rows, rank]`` and ``name_b [rank, k]`` are."""
    found.tensor(f"{name}_b", (max(rank, 1), k))
    found.tensor(f"{name}_a", (rows, max(rank, 1)))


def _lokr(found: Found, rows: int, k: int) -> Weight:
    tensors: dict[str, Tensor] = {}
    shapes, rank = [], None
    for one in ("lokr_w1", "lokr_w2"):
        halves = [half for half in ("_a", "_b") if one + half in found.parts]
        if halves and one in found.parts:
            raise _two_kinds(found, f"{one} and {one}{halves[0]}")
        for name in [one + half for half in ("_a", "_b")] if halves else [one]:
            tensors[name] = found.tensor(name)
            if tensors[name].ndim != 2 or 0 in tensors[name].shape:
                raise found.wrong_shape(name, "two dimensions")
        if halves:
            left, right = tensors[f"{one}_a"], tensors[f"{one}_b"]
            if left.shape[1] != right.shape[0]:
                raise found.wrong_shape(f"{one}_a", f"[.., {right.shape[0]}]")
            rank = right.shape[0]
            shapes.append((left.shape[0], right.shape[1]))
        else:
            shapes.append(tuple(tensors[one].shape))
    (a, b), (c, d) = shapes
    if (a * c, b * d) != (rows, k):
        name = next(name for name in tensors if name.startswith("lokr_w2"))
        raise found.wrong_shape(name, f"a Kronecker product of {rows} x {k}, not {a * c} x {b * d}")
    return "lokr", tensors, found.scale(rank)


def _oft(found: Found, rows: int, _k: int) -> Weight:
    blocks = found.tensor("oft_blocks")
    size = blocks.shape[-1] if blocks.ndim else 0
    if blocks.ndim not in (3, 4) or not size or blocks.shape[-2] != size:
        raise found.wrong_shape("oft_blocks", "[blocks, b, b] or [stages, blocks, b, b]")
    kind = "oft" if blocks.ndim == 3 else "boft"
    stages = len(blocks)
    if blocks.shape[-3] * size != rows or (
        kind == "boft" and (size % 2 or not stages or rows % (2**stages * size // 2))
    ):
        raise found.wrong_shape("oft_blocks", f"blocks of {rows} rows")
    tensors = {"oft_blocks": blocks}
    if "rescale" in found.parts:
        tensors["rescale"] = found.tensor("rescale", (rows, 1), (rows,))
    return kind, tensors, (found.alpha() or 0.0) * rows


def _oft_of_inputs(found: Found, _rows: int, k: int) -> Weight:
    upper = found.tensor("oft_R")
    size = block_size(upper.shape[1]) if upper.ndim == 2 else 0
    if not size or k % size or len(upper) not in (1, k // size):
        raise found.wrong_shape("oft_R", f"[blocks, b (b - 1) / 2] with blocks of {k} inputs")
    return "oft of inputs", {"oft_R": upper}, found.strength.bound / len(upper) ** 0.5


def _boft_of_inputs(found: Found, rows: int, k: int) -> Weight:
    blocks = found.tensor("boft_R")
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[1:3].numel() != k:
        raise found.wrong_shape("boft_R", f"[1, blocks, b, b] with blocks of {k} inputs")
    if len(blocks) != 1:
        raise CheckpointError(
            "a BOFT of PEFT with several butterfly factors is not supported",
            file=found.file,
            tensor=found.parts["boft_R"][0],
            found=f"{len(blocks)} factors",
            needed="boft_n_butterfly_factor 1, its default",
        )
    tensors = {"boft_R": blocks}
    if "boft_s" in found.parts:
        tensors["boft_s"] = found.tensor("boft_s", (rows, 1), (rows,))
    return "boft of inputs", tensors, 1.0


def _whole(part: str) -> Callable[[Found, int, int], Weight]:
    def read(found: Found, rows: int, k: int) -> Weight:
        kind, name = ("set", "set_weight") if part == "set_weight" else ("diff", "diff")
        return kind, {name: found.tensor(part, (rows, k))}, 1.0

    return read


_FAMILIES = {
    "lora": _lora,
    "hada": _loha,
    "lokr": _lokr,
    "oft_blocks": _oft,
    "oft_R": _oft_of_inputs,
    "boft_R": _boft_of_inputs,
    "diff": _whole("diff"),
    "w_norm": _whole("w_norm"),
    "set_weight": _whole("set_weight"),
}


def _low_rank(kind: str, tensors: Mapping[str, Tensor], scale: float) -> LowRank | None:
    """The same update as two halves: exact, where their rank is small enough for a side path."""
    if kind == "lora":
        return LowRank(tensors["down"], tensors["up"] * scale)
    if kind == "loha":
        (a, b), (c, d) = ((tensors[f"{n}_a"], tensors[f"{n}_b"]) for n in ("hada_w1", "hada_w2"))
        if len(b) * len(d) > LARGEST_SIDE_PATH:
            return None
        # (a b) * (c d): each pair of their ranks is a rank of the product
        up = (a[:, :, None] * c[:, None, :]).flatten(1)
        return LowRank((b[:, None] * d[None]).flatten(0, 1), up * scale)
    if kind == "lokr":
        (a, b), (c, d) = (_halves(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        if len(b) * len(d) > LARGEST_SIDE_PATH:
            return None
        return LowRank(torch.kron(b, d), torch.kron(a, c) * scale)
    return None


def _halves(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """``left @ right`` of a factor, by the smaller of its sides where it is stored whole."""
    if name not in tensors:
        return tensors[f"{name}_a"], tensors[f"{name}_b"]
    whole = tensors[name]
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])


def _two_kinds(found: Found, what: str) -> CheckpointError:
    return CheckpointError(
        "this holds two kinds of change of one weight, which belong to no trainer's file",
        file=found.file,
        tensor=found.module,
        found=what,
        needed="one kind a linear",
    )
