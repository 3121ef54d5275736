"""SQNR and largest error against their definitions, on awkward sizes."""

import math

import pytest
import torch

from ideogram4_quant.quant.measure import ErrorMeter, dense_rows


def test_sqnr_is_the_ratio_of_sums_whatever_the_chunks():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(63, 100, generator=generator)
    stored = weight + 0.01 * torch.randn(63, 100, generator=generator)
    noise = (stored.double() - weight.double()).square().sum()
    wanted = 10 * math.log10((weight.double().square().sum() / noise).item())
    whole, parts = ErrorMeter(), ErrorMeter()
    whole.add(weight, stored)
    for row in range(63):
        part = ErrorMeter()
        part.add(weight[row], stored[row])
        parts.merge(part)
    assert whole.sqnr_db == pytest.approx(wanted, abs=1e-6)
    assert parts.sqnr_db == pytest.approx(wanted, abs=1e-6)
    largest = (stored.double() - weight.double()).abs().max().item()
    assert whole.max_abs_error == parts.max_abs_error == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "stored", "wanted"),
    [([1.0], [1.0], math.inf), ([0.0], [0.0], math.inf), ([0.0], [1.0], -math.inf)],
)
def test_limits(weight, stored, wanted):
    meter = ErrorMeter()
    meter.add(torch.tensor(weight), torch.tensor(stored))
    assert meter.sqnr_db == wanted


def test_nan_is_never_hidden():
    meter = ErrorMeter()
    meter.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    meter.add(torch.tensor([1.0]), torch.tensor([3.0]))
    assert math.isnan(meter.sqnr_db)
    assert math.isnan(meter.max_abs_error)


def test_rows_are_fp32_copies_of_any_float():
    tensor = torch.arange(6.0).reshape(3, 2).bfloat16()
    rows = dense_rows(tensor, slice(1, 3))
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[2.0, 3.0], [4.0, 5.0]]
