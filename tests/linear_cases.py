"""Random values, layouts and backends that the tests of linears share."""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ideogram4_quant.ops import dispatch

CPU = torch.device("cpu")
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1, 1, 1), (1, 16, 64), (3, 63, 100), (17, 5, 255), (33, 40, 2000), (300, 129, 256)]
BACKENDS = [r.name for r in dispatch.reports(CPU) if r.available and r.name != "triton"]
KINDS = {
    "int8": ("Ideogram4QuantInt8", {}),
    "int8 smooth rotated": ("Ideogram4QuantInt8", {"smooth": 1.25, "rotation": 64}),
    "Q8_0": ("Ideogram4QuantGGUF", {"qtype": "Q8_0"}),
    "Q4_K": ("Ideogram4QuantGGUF", {"qtype": "Q4_K"}),
    "fp8": ("Ideogram4QuantFP8", {}),
    "nf4": ("Ideogram4QuantNF4", {}),
}


def make(kind, weight):
    layout, options = KINDS[kind]
    if "smooth" in options:
        smooth = torch.linspace(0.5, 2, weight.shape[1]) * options["smooth"]
        options = {**options, "smooth": smooth}
    return QuantizedTensor.from_float(weight, layout, **options)
