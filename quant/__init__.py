"""Recipes that make quantized files, and the tools that look into files."""

from .errors import AlreadyQuantizedError, NonFiniteWeightError, QuantOptionError
from .inspect import Inspection, inspect_file
from .quantize import QuantPlan, plan_quantization, quantize_checkpoint
from .recipes import RECIPES, QuantOptions, Recipe, TypeRule
from .report import QuantReport, TensorResult
from .verify import Verification, verify_file

__all__ = [
    "RECIPES",
    "AlreadyQuantizedError",
    "Inspection",
    "NonFiniteWeightError",
    "QuantOptionError",
    "QuantOptions",
    "QuantPlan",
    "QuantReport",
    "Recipe",
    "TensorResult",
    "TypeRule",
    "Verification",
    "inspect_file",
    "plan_quantization",
    "quantize_checkpoint",
    "verify_file",
]
