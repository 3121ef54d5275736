"""Formats, weights and round trips that the tests of block encoding share."""

from __future__ import annotations

import torch

from ideogram4_quant.ops.blocks import FORMATS, dequantize, quantize
from ideogram4_quant.tests.tensors import randn

NAMES = list(FORMATS)
FLOATS = ["F32", "F16", "BF16"]
SIMPLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_FORMATS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TABLES = ["IQ4_NL", "IQ4_XS"]
PACKED = SIMPLE + K_FORMATS + TABLES


def planted(seed=0):
    """[16, 512] with the rows that break encoders: zeros, constants, ties, outliers, tiny ones."""
    weight = randn(16, 512, seed=seed) * 0.02
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -0.37
    weight[3, 100] = 30.0
    weight[4, 200] = -3e4
    weight[5, :40] = 0
    weight[6] *= 1e-6
    weight[7, ::2], weight[7, 1::2] = 0.5, -0.5  # both signs reach the peak
    weight[8] = torch.arange(512) % 17 - 8.0  # exact integers: ties in rounding
    weight[9].abs_()
    weight[10].abs_().neg_()
    weight[11] *= torch.logspace(-6, 1, 512)
    weight[12] = weight[12].bfloat16().float()
    weight[13] *= 1e-12  # its float16 scales are zero
    return weight


def round_trip(weight, name, importance=None):
    return dequantize(quantize(weight, name, importance), name, weight.shape)
