"""Sizes on the grid of tokens, from anything that a person or another node asks for."""

from __future__ import annotations

import math

import pytest

from ideogram4_quant.errors import OpError
from ideogram4_quant.sampling import RATIOS, check_size, on_grid, size_of


@pytest.mark.parametrize("side", [*range(1, 100), 1000, 1023, 1024, 1025, 1360, 8191])
def test_a_side_becomes_the_nearest_multiple_of_16(side):
    """The nearest by trying all; a tie goes up, and nothing is less than one token."""
    (width, height), said = on_grid(side, 64)
    wanted = min(range(16, 9000, 16), key=lambda grid: (abs(grid - side), -grid))
    assert (width, height) == (wanted, 64)
    assert (said is None) == (wanted == side)
    if said is not None:
        assert f"{side}x64" in said
        assert f"{wanted}x64" in said


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("megapixels", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_ratio_and_area_are_kept_as_far_as_the_grid_allows(ratio, megapixels):
    width, height = size_of(ratio, megapixels)
    assert width % 16 == height % 16 == 0
    left, right = map(int, ratio.split(":"))
    exact = math.sqrt(megapixels * 1024 * 1024 * left / right)
    assert abs(width - exact) <= 8
    assert abs(height - exact * right / left) <= 8


def test_ratios_are_trained_ones_and_the_usual_sizes():
    assert size_of("1:1", 1.0) == (1024, 1024)
    assert size_of("16:9", 1.0) == (1360, 768)
    assert size_of("9:16", 1.0) == (768, 1360)
    for ratio in RATIOS:
        assert check_size(*size_of(ratio, 1.0)) == []


@pytest.mark.parametrize(
    ("ratio", "megapixels"),
    [("16/9", 1.0), ("0:1", 1.0), ("a:b", 1.0), ("", 1.0), ("1:1", 0.0), ("1:1", math.nan)],
)
def test_impossible_ratios_and_areas_say_what_is_needed(ratio, megapixels):
    with pytest.raises(OpError, match=r"such as"):
        size_of(ratio, megapixels)
