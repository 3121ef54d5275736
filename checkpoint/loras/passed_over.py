"""What a LoRA file holds or tells beside the updates of its linears: nothing of it is passed over.

A tensor under a linear's name, or a statement, that is not understood changes what the update
means, as AdaLoRA's ``lora_E`` or PiSSA's start from other weights than the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError

_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_")
_PARTS = 12  # components of a name that are compared; those of this model have 5
# Starts of PEFT that take something out of the model's weights
_OTHER_START = re.compile(r"pissa.*|olora|corda|loftq|lora_ga", re.IGNORECASE)
_KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")  # of PEFT, that are read here
MERGED = "Merge it into the model with its trainer's program and quantize that."


def refuse_passed_over(
    state: Mapping[str, Tensor], unknown: Iterable[str], known: Mapping[str, str], file: str
) -> None:
    """CheckpointError, naming the tensor, for one of a linear's that no update takes in.

    unknown: the names that were understood as no part of an update. known: every spelling of the
    model's linears. Codes of a quantized LoRA are refused too.
    """
    left_out = set(unknown)
    first = {module.partition(".")[0] for module in known}
    for name in left_out:
        module = _module(name, known, first)
        if module is not None:
            raise CheckpointError(
                "this tensor of a linear is not understood",
                file=file,
                tensor=name,
                found=f"{name.rpartition(module)[2].lstrip('.')} at {module}",
                hint=f"Without it the LoRA would not act as it was trained. {MERGED}",
            )
    for name, tensor in state.items():
        if name not in left_out and not tensor.is_floating_point() and tensor.ndim > 1:
            raise CheckpointError(
                "a quantized LoRA is not supported",
                file=file,
                tensor=name,
                found=str(tensor.dtype).removeprefix("torch."),
                needed="floats",
                hint="Save it in bf16 or fp16.",
            )


def _module(name: str, known: Mapping[str, str], first: Collection[str]) -> str | None:
    """The linear that a name begins with, behind any prefix, as the name spells it.

    first: what the names of linears begin with, up to a dot.
    """
    parts = name[-400:].split(".")[-_PARTS:]
    parts = [_UNDERSCORED.sub("", parts[0], count=1), *parts[1:]]
    for start in range(len(parts) - 1):
        if parts[start] not in first:
            continue
        for end in range(len(parts) - 1, start, -1):
            module = ".".join(parts[start:end])
            if module in known:
                return module
    return None


def refuse_statements(config: Mapping[str, Any], file: str) -> None:
    """CheckpointError for a PEFT config of an adapter that is none of the kinds that are read, or
    not one of the model's own weights."""
    start, kind = config.get("init_lora_weights"), str(config.get("peft_type") or "LORA")
    found = None
    if isinstance(start, str) and _OTHER_START.fullmatch(start):
        found = f"init_lora_weights {start}, which changed the model's own weights"
    elif kind.rpartition(".")[2].upper() not in _KINDS:
        found = f"peft_type {kind}"
    elif config.get("alora_invocation_tokens"):
        found = "alora_invocation_tokens: it acts on some tokens alone"
    if found is not None:
        raise CheckpointError(
            "this is no LoRA for the model's own weights, says its metadata",
            file=file,
            found=found[:120],
            needed="a LoRA of PEFT's usual kind",
            hint="PEFT converts one when it saves: path_initial_model_for_weight_conversion."
            if isinstance(start, str) and "init_lora" in found
            else MERGED,
        )
