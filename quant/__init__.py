"""Recipes that make quantized files, and the tools that look into files."""

from .calibration import Calibration, Run
from .errors import AlreadyQuantizedError, CalibrationError, NonFiniteWeightError, QuantOptionError
from .inspect import Inspection, inspect_file
from .layer_stats import LayerStats
from .quantize import QuantPlan, plan_quantization, quantize_checkpoint
from .recipes import RECIPES, QuantOptions, Recipe, TypeRule
from .report import QuantReport, TensorResult
from .verify import Verification, verify_file

__all__ = [
    "RECIPES",
    "AlreadyQuantizedError",
    "Calibration",
    "CalibrationError",
    "Inspection",
    "LayerStats",
    "NonFiniteWeightError",
    "QuantOptionError",
    "QuantOptions",
    "QuantPlan",
    "QuantReport",
    "Recipe",
    "Run",
    "TensorResult",
    "TypeRule",
    "Verification",
    "inspect_file",
    "plan_quantization",
    "quantize_checkpoint",
    "verify_file",
]
