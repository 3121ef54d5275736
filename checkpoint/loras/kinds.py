"""What a LoRA file says beside its tensors: kinds that do not fit this model, and its strength."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import CheckpointError, CorruptFileError
from .passed_over import MERGED, refuse_statements

_STOCK = "Load it with the stock Load LoRA node, which patches the weights."
# the tail of a tensor's name -> what the file is
_KINDS = {
    r"lora_mid\.weight|hada_t[12](\.\w+)?|lokr_t2(\.\w+)?": "a LoCon with a factor of convolutions",
    r"lora_embedding_[AB](\.\w+){0,2}": "a LoRA of an embedding",
    r"glora_\w+|[ab][12]\.weight": "a GLoRA",
    r"oft_[^\WbR]\w*(\.\w+)?": "an OFT of another form",
}
# those that ComfyUI's own node passes over, too
_UNKNOWN_TO_HOST = {
    r"lora_E(\.\w+)?": "an AdaLoRA",
    r"vera_lambda_[bd](\.\w+)?": "a VeRA",
    r"randlora_\w+(\.\w+)?": "a RandLoRA",
    r"ia3_l(\.\w+)?|on_input": "an IA3",
    r"hra_u(\.\w+)?": "an HRA",
    r"(?:miss|bone)_block(\.\w+)?": "a MiSS (Bone)",
    r"shira_weight(\.\w+)?": "a SHiRA",
    r"(?:fourierft|waveft)_spectrum(\.\w+)?": "a FourierFT",
    r"c3a_kernel(\.\w+)?": "a C3A",
    r"road_(?:alpha|theta)(\.\w+)?": "a RoAd",
    r"vblora_\w+(\.\w+)?": "a VB-LoRA",
    r"ln_tuning_layers\.\w+": "a tuning of norms by PEFT",
    r"[pq]_layer\.weight|lambda_layer": "a T-LoRA",
}
_TAILS = [
    (re.compile(rf"(^|\.)(?:{tail})$"), kind, hint)
    for kinds, hint in ((_KINDS, _STOCK), (_UNKNOWN_TO_HOST, MERGED))
    for tail, kind in kinds.items()
]
_TAIL, _WORDS = 96, 3  # characters: more than any of these tails has; words: as many as the longest
ADAPTER, _KOHYA = "lora_adapter_metadata", "ss_network_alpha"


def _kind_of(name: str) -> tuple[str, str] | None:
    """What a file with a tensor of this name is, and what to do, if its kind is not supported."""
    # a stranger's thousands of long names would take a second
    end = name if len(name) <= _TAIL else name[-_TAIL:].partition(".")[2]
    end = ".".join(end.rsplit(".", _WORDS)[-_WORDS:])
    return next(((kind, hint) for tail, kind, hint in _TAILS if tail.search(end)), None)


def refuse_other_kinds(names: Iterable[str], file: str) -> None:
    """CheckpointError that names the kind, for files of a kind that is not supported."""
    for name in names:
        found = _kind_of(name)
        if found is not None:
            kind, hint = found
            raise CheckpointError(
                f"this is {kind}, which is not supported",
                file=file,
                tensor=name,
                needed="LoRA, DoRA, LoKr, LoHa, OFT, BOFT or diffs of linears",
                hint=hint,
            )


@dataclass(frozen=True)
class Strength:
    """alpha where a linear has no alpha tensor, as the file's metadata states it.

    A linear's scale is ``alpha / rank``; with ``rslora`` ``alpha / sqrt(rank)``. Without a
    statement alpha is the rank, so that the scale is 1. dora: the file says that it is a DoRA.
    rank: PEFT's r, by which it divides alpha of a LoKr of whole matrices too. bound: eps of PEFT's
    COFT, which its rotations are kept within; 0 for none. patterns, ranks: alpha and r of the
    modules whose names match.
    """

    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    rank: float | None = None
    bound: float = 0.0
    patterns: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)

    def scale(self, modules: Iterable[str], rank: int | None) -> float:
        """The scale of one linear; modules: the spellings of its name. rank None: of no halves."""
        modules = tuple(modules)
        alpha = _matching(self.patterns, modules, self.alpha)
        rank = _matching(self.ranks, modules, self.rank) if rank is None else rank
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _matching(
    patterns: Mapping[str, float], modules: Iterable[str], otherwise: float | None
) -> float | None:
    """The value of the first pattern that PEFT matches: the whole name, or its end after a dot."""
    for pattern, value in patterns.items():
        if any(re.search(rf"(?:^|\.)(?:{pattern})$", module) for module in modules):
            return value
    return otherwise


AS_STORED = Strength()


def strength_of(metadata: Mapping[str, Any], file: str) -> Strength:
    """What ``lora_adapter_metadata`` (PEFT through diffusers) or ``ss_network_alpha`` (kohya) say.

    CorruptFileError for statements that are no numbers, CheckpointError for two that disagree.
    """
    text = metadata.get(ADAPTER)
    if text is not None:
        return _peft(text, file)
    stated = metadata.get(_KOHYA)
    return Strength() if stated in (None, "None", "") else Strength(_number(stated, _KOHYA, file))


def _peft(text: Any, file: str) -> Strength:
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CorruptFileError("its metadata is no JSON object", file=file, tensor=ADAPTER)
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
    if own.get("peft_type") == "OFT" and (
        not own.get("use_cayley_neumann", True) or own.get("num_cayley_neumann_terms", 5) != 5
    ):
        raise CheckpointError(
            "this OFT was trained with another map of its rotations than PEFT's default",
            file=file,
            found=f"num_cayley_neumann_terms {own.get('num_cayley_neumann_terms')}, "
            f"use_cayley_neumann {own.get('use_cayley_neumann')}",
            needed="5 and true",
        )
    alpha = own.get("lora_alpha", own.get("alpha"))
    lokr = str(own.get("peft_type")).upper().endswith("LOKR")  # halves of others show their rank
    return Strength(
        None if alpha is None else _number(alpha, "lora_alpha", file),
        bool(own.get("use_rslora")),
        bool(own.get("use_dora")),
        bound=_number(own.get("eps", 6e-5), "eps", file) if own.get("coft") else 0.0,
        rank=None if own.get("r") is None else _number(own["r"], "r", file) or None,
        patterns=_patterns(own, "alpha_pattern", file),
        ranks=_patterns(own, "rank_pattern", file) if lokr else {},
    )


def _patterns(config: Mapping[str, Any], key: str, file: str) -> dict[str, float]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CorruptFileError(f"its {key} is no object", file=file, tensor=ADAPTER)
    return {_checked(k, key, file): _number(v, f"{key} {k}", file) for k, v in patterns.items()}


def _checked(pattern: str, key: str, file: str) -> str:
    """A pattern is a module's name or its end; other regular expressions could take for ever."""
    if not re.fullmatch(r"[\w.^$]{1,300}", pattern):
        raise CheckpointError(
            f"a pattern of its {key} is not supported",
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
