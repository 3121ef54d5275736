"""The guidance input and the factor of every step."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.nodes.guidance import Guidance, format_guidance, parse_guidance


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("7", (7.0,)),
        (" 7*2, 3.5 ", (7.0, 7.0, 3.5)),
        ("7x2;3", (7.0, 7.0, 3.0)),
        (".5*1", (0.5,)),
        ("0*3", (0.0,) * 3),
    ],
)
def test_guidance_is_read(text, values):
    assert parse_guidance(text) == values
    assert parse_guidance(format_guidance(values)) == values


@pytest.mark.parametrize(
    "text",
    ["", " , ", "seven", "7*0", "7*1001", "7*-1", "1e9", "101", "7**2", "nan", "7*600,7*600"],
)
def test_unreadable_guidance_is_refused(text):
    with pytest.raises(OpError):
        parse_guidance(text)


def factors(guidance: Guidance, sigmas: list[float]) -> tuple[float, ...]:
    return tuple(step.guidance for step in guidance.plan(sigmas))


def curve(steps: int, end: float = 0.0) -> list[float]:
    return torch.linspace(1.0, end, steps + 1).tolist()


def test_preset_polishes_the_last_steps_only():
    assert factors(Guidance("turbo"), curve(12)) == (7.0,) * 11 + (3.0,)
    assert factors(Guidance("default"), curve(5)) == (7.0,) * 3 + (3.0,) * 2


def test_first_part_of_a_split_schedule_has_no_polish_steps():
    assert factors(Guidance("quality"), curve(6, end=0.4)) == (7.0,) * 6


def test_image_to_image_takes_the_last_entries_of_a_list():
    guidance = Guidance(None, (9.0, 8.0, 7.0, 3.0))
    assert factors(guidance, curve(2)) == (7.0, 3.0)
    assert factors(guidance, curve(2, end=0.5)) == (9.0, 8.0)
    assert factors(Guidance(None, (4.0,)), curve(3)) == (4.0,) * 3


def test_list_that_is_too_short_is_refused():
    with pytest.raises(OpError, match="2 entries for 3 steps"):
        Guidance(None, (7.0, 3.0)).plan(curve(3))
