"""LoRA files of every trainer and kind, read and checked against this model."""

from .changes import WeightChange, changed
from .files import LoraFile, describe, parse_lora, read_lora, read_strength, refuse_changes
from .kinds import Strength, strength_of
from .low_rank import LowRank, stack

__all__ = [
    "LoraFile",
    "LowRank",
    "Strength",
    "WeightChange",
    "changed",
    "describe",
    "parse_lora",
    "read_lora",
    "read_strength",
    "refuse_changes",
    "stack",
    "strength_of",
]
