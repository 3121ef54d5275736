"""What the nodes read LoRA files with: `checkpoint.loras`, which the engine uses as well."""

from ..checkpoint.loras import (
    LoraFile,
    LowRank,
    describe,
    parse_lora,
    read_lora,
    read_strength,
    refuse_changes,
    stack,
)

__all__ = [
    "LoraFile",
    "LowRank",
    "describe",
    "parse_lora",
    "read_lora",
    "read_strength",
    "refuse_changes",
    "stack",
]
