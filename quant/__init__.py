"""Recipes that make quantized files, and the tools that look into files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import lazy

if TYPE_CHECKING:
    from .calibration import Calibration, Run
    from .errors import (
        AlreadyQuantizedError,
        CalibrationError,
        NonFiniteWeightError,
        QuantOptionError,
    )
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

__getattr__ = lazy.names(
    __name__,
    {
        "RECIPES": "recipes",
        "AlreadyQuantizedError": "errors",
        "Calibration": "calibration",
        "CalibrationError": "errors",
        "Inspection": "inspect",
        "LayerStats": "layer_stats",
        "NonFiniteWeightError": "errors",
        "QuantOptionError": "errors",
        "QuantOptions": "recipes",
        "QuantPlan": "quantize",
        "QuantReport": "report",
        "Recipe": "recipes",
        "Run": "calibration",
        "TensorResult": "report",
        "TypeRule": "recipes",
        "Verification": "verify",
        "inspect_file": "inspect",
        "plan_quantization": "quantize",
        "quantize_checkpoint": "quantize",
        "verify_file": "verify",
    },
)
