"""Rounding to a table of codes, against the nearest entry found by trying them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideogram4_quant.ops.codes import IQ4, Codebook, Levels, round_codes_
from ideogram4_quant.tests.tensors import randn

torch.set_num_threads(1)

E2M1 = Codebook((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))


def nearest(values, book):
    table = torch.tensor(book.values, dtype=torch.float64)
    return table[(values.double()[..., None] - table).abs().argmin(-1)].float()


@pytest.mark.parametrize("book", [IQ4, E2M1, Codebook((-128, 127)), Codebook((5,))])
def test_the_nearest_entry(book):
    values = randn(40, 500, seed=1) * torch.logspace(-3, 3, 500)
    wanted = nearest(values, book)
    found = round_codes_(values.clone(), book)
    off = found != wanted  # within an ulp of the middle of two entries, if anywhere
    assert ((values - found).abs() <= (values - wanted).abs() * (1 + 1e-6) + 1e-5)[off].all()
    assert off.sum() < 5
    assert torch.equal(round_codes_(found.clone(), book), found)


@settings(max_examples=60, deadline=None)
@given(entries=st.sets(st.integers(-128, 127), min_size=1, max_size=16), value=st.floats(width=32))
def test_any_table_any_value(entries, value):
    book = Codebook(tuple(sorted(entries)))
    found = book.nearest_(torch.tensor([value])).item()
    assert found in entries
    if value == value:
        exact = min(abs(value - entry) for entry in entries)
        assert abs(value - found) <= exact + 1e-4 * max(1.0, exact)


def test_views_and_places():
    whole = randn(6, 8, 10, seed=2) * 60
    wanted = nearest(whole, IQ4)
    part = whole[:, 2:7]
    assert IQ4.nearest_(part) is part
    assert torch.equal(whole[:, 2:7], wanted[:, 2:7])
    codes = wanted.to(torch.int8)
    table = torch.tensor(IQ4.values, dtype=torch.int8)
    assert torch.equal(table[IQ4.places(codes).long()], codes)
    assert IQ4.places(codes.transpose(0, 2)).shape == (10, 8, 6)


def test_a_run_is_rounded_to_even_and_clamped():
    values = torch.tensor([0.5, 1.5, -2.5, 90.0, -90.0])
    assert round_codes_(values, (-4, 3)).tolist() == [0, 2, -2, 3, -4]


@pytest.mark.parametrize("values", [(3, 2), (1, 1, 2), (-129, 0), (0, 128)])
def test_other_tables_are_refused(values):
    with pytest.raises(ValueError, match="no ascending int8 values"):
        Codebook(values)


def test_levels_of_turned_values_are_found_without_a_word_of_torch(recwarn):
    """What rounds by a table is given panels that do not lie in memory as they are read: torch
    copies them, and warns each user once."""
    values = randn(64, 48, seed=3).t()
    table = torch.tensor([-1.5, -0.25, 0.0, 0.5, 1.0])
    wanted = (values[..., None] - table).abs().argmin(-1)
    torch.set_warn_always(True)
    try:
        found = Levels((0, 4), table).round_(values, torch.zeros(48, dtype=torch.long))
    finally:
        torch.set_warn_always(False)
    assert torch.equal(found, wanted)
    assert not recwarn.list
