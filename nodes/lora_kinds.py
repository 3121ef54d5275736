"""What a LoRA file says beside its two halves: kinds that no side path can be, and its strength."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, CorruptFileError
from .lora_passed_over import refuse_statements

_STOCK = "Load it with the stock Load LoRA node, which patches the weights."
# the tail of a tensor's name -> what the file is
_KINDS = {
    r"dora_scale|lora_magnitude_vector(\.\w+)*": "a DoRA, which rescales the weights",
    r"diff|diff_b|set_weight": "a file with whole changes of weights or biases (.diff, .diff_b)",
    r"lokr_\w+": "a LoKr",
    r"hada_\w+": "a LoHa",
    r"oft_\w+(\.\w+)*|oft_blocks|boft_\w+(\.\w+)*": "an OFT",
    r"lora_mid\.weight": "a LoCon with a middle factor",
    r"lora_embedding_[AB](\.\w+)*": "a LoRA of an embedding",
    r"lora_[AB](\.\w+)*\.bias|lora_(up|down)\.bias": "a LoRA with a bias of its own",
    r"w_norm|b_norm": "a LyCORIS Norm",
    r"glora_\w+|[ab][12]\.weight": "a GLoRA",
}
_TAILS = [(re.compile(rf"(^|\.)(?:{tail})$"), kind) for tail, kind in _KINDS.items()]
_TAIL = 96  # characters: more than any of these tails has
_ADAPTER, _KOHYA = "lora_adapter_metadata", "ss_network_alpha"


def kind_of(name: str) -> str | None:
    """What a file with a tensor of this name is, if it is more than a plain LoRA."""
    # a stranger's thousands of long names would take a second
    end = name if len(name) <= _TAIL else name[-_TAIL:].partition(".")[2]
    return next((kind for tail, kind in _TAILS if tail.search(end)), None)


def refuse_other_kinds(names: Iterable[str], file: str) -> None:
    """CheckpointError that names the kind, for files that up @ down alone would apply wrongly."""
    for name in names:
        kind = kind_of(name)
        if kind is not None:
            raise CheckpointError(
                f"this is {kind}: a side path cannot apply it",
                file=file,
                tensor=name,
                needed="a plain LoRA: pairs of lora_A and lora_B, or lora_down and lora_up",
                hint=_STOCK,
            )


@dataclass(frozen=True)
class Strength:
    """alpha where a linear has no alpha tensor, as the file's metadata states it.

    A linear's scale is ``alpha / rank``; with ``rslora`` ``alpha / sqrt(rank)``. Without a
    statement alpha is the rank, so that the scale is 1.
    """

    alpha: float | None = None
    rslora: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def scale(self, modules: Iterable[str], rank: int) -> float:
        """The scale of one linear; modules: the spellings of its name."""
        alpha = self.alpha
        for pattern, value in self.patterns.items():
            # as PEFT matches: the whole name, or its end after a dot
            if any(re.search(rf"(?:^|\.)(?:{pattern})$", module) for module in modules):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


AS_STORED = Strength()


def strength_of(
    metadata: Mapping[str, Any], file: str, beside: Mapping[str, Any] = MappingProxyType({})
) -> Strength:
    """What ``lora_adapter_metadata`` (PEFT through diffusers) or ``ss_network_alpha`` (kohya) say.

    Else what ``beside`` says, PEFT's config that lies by the file.
    CorruptFileError for statements that are no numbers; CheckpointError for a DoRA.
    """
    text = metadata.get(_ADAPTER)
    if text is not None:
        return _peft(text, file)
    stated = metadata.get(_KOHYA)
    if stated in (None, "None", "") and beside:
        return _stated(beside, file)
    return Strength() if stated in (None, "None", "") else Strength(_number(stated, _KOHYA, file))


def _peft(text: Any, file: str) -> Strength:
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CorruptFileError("its metadata is no JSON object", file=file, tensor=_ADAPTER)
    return _stated(config, file)


def _stated(config: Mapping[str, Any], file: str) -> Strength:
    own: dict[str, Any] = {}
    for key, value in config.items():  # transformer.lora_alpha; a text encoder's is not ours
        short = key.rpartition(".")[2]
        if "encoder" in key:
            continue
        if own.setdefault(short, value) != value:
            raise CheckpointError(
                f"its copies state two values of {short}, which is not supported",
                file=file,
                found=f"{own[short]} and {value}",
                hint=_STOCK,
            )
    refuse_statements(own, file)
    if own.get("use_dora"):
        raise CheckpointError(
            "this is a DoRA, which rescales the weights: a side path cannot apply it",
            file=file,
            found="use_dora in its metadata",
            hint=_STOCK,
        )
    alpha = own.get("lora_alpha")
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CorruptFileError("its alpha_pattern is no object", file=file, tensor=_ADAPTER)
    return Strength(
        None if alpha is None else _number(alpha, "lora_alpha", file),
        bool(own.get("use_rslora")),
        {_checked(k, file): _number(v, f"alpha_pattern {k}", file) for k, v in patterns.items()},
    )


def _checked(pattern: str, file: str) -> str:
    """A pattern is a module's name or its end; other regular expressions could take for ever."""
    if not re.fullmatch(r"[\w.^$]{1,300}", pattern):
        raise CheckpointError(
            "a pattern of its alpha_pattern is not supported",
            file=file,
            found=pattern,
            needed="names of modules",
            hint=_STOCK,
        )
    return pattern


def _number(value: Any, name: str, file: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise CorruptFileError(f"its {name} is no number", file=file, found=value)
    return number
