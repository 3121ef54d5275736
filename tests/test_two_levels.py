"""Pairs whose copies have two levels: which files, what auto takes, what is refused."""

from __future__ import annotations

import pytest

from ideogram4_quant.checkpoint.level_order import (
    AUTO,
    AUTO_ORDER,
    LEVELS,
    PAIRED,
    SAME,
    capability,
    two_levels,
)
from ideogram4_quant.checkpoint.levels import resolve
from ideogram4_quant.checkpoint.pairs import WORKING_MEMORY
from ideogram4_quant.errors import CheckpointError, PairMismatchError
from ideogram4_quant.tests.fixtures_levels import BOTH, COND, UNCOND, Header, catalogue

ORDER = AUTO_ORDER[capability(int8=True, bfloat16=True)]
INT8 = "INT8 W8A8 rotated"
GB = 10**9
SIZES = {INT8: 10 * GB, "Q6_K": 8 * GB, "Q5_K": 7 * GB, "Q4_K": 6 * GB}


def pairs(*levels: str, **more: Header):
    """A folder with both copies of each level in two files of its own, and ``more``."""
    files = {}
    for level in levels:
        files[f"{level}-cond"] = Header(level, COND, SIZES[level])
        files[f"{level}-uncond"] = Header(level, UNCOND, SIZES[level])
    return catalogue(**files, **more)


def test_each_copy_has_the_level_that_was_asked_for():
    files = pairs(INT8, "Q4_K")
    found = resolve(INT8, files, ORDER, 0, unconditional="Q4_K")
    assert (found.conditional.name, found.unconditional.name) == (f"{INT8}-cond", "Q4_K-uncond")
    assert (found.level, found.levels) == (INT8, (INT8, "Q4_K"))
    assert found.label == "INT8 W8A8 rotated + Q4_K"
    assert found.weight_bytes() == (10 * GB, 6 * GB)
    other = resolve("Q4_K", files, ORDER, 0, unconditional=INT8)
    assert other.label == "Q4_K + INT8 W8A8 rotated"


@pytest.mark.parametrize("beside", [SAME, "Q4_K"])
def test_one_level_twice_is_no_pair_of_two(beside):
    found = resolve("Q4_K", pairs(INT8, "Q4_K"), ORDER, 0, unconditional=beside)
    assert (found.levels, found.label) == (("Q4_K",), "Q4_K")


def test_a_file_of_both_copies_gives_either():
    files = catalogue(whole=Header("Q8_0", BOTH, 20 * GB), small=Header("Q4_K", BOTH, 12 * GB))
    found = resolve("Q8_0", files, ORDER, 0, unconditional="Q4_K")
    assert (found.conditional.name, found.unconditional.name) == ("whole", "small")
    assert found.weight_bytes() == (10 * GB, 6 * GB)


def test_a_copy_that_is_not_there_is_named():
    files = catalogue(a=Header(INT8, COND), b=Header("Q4_K", COND), c=Header("Q5_K", UNCOND))
    with pytest.raises(CheckpointError, match=r"no Q4_K file .* holds the unconditional copy"):
        resolve(INT8, files, ORDER, 0, unconditional="Q4_K")
    with pytest.raises(CheckpointError, match=r"no Q5_K file .* holds the conditional copy"):
        resolve("Q5_K", files, ORDER, 0, unconditional="Q4_K")
    with pytest.raises(CheckpointError, match=r"no Q4_K file .* holds the unconditional copy"):
        resolve(AUTO, files, ORDER, 10**12, unconditional="Q4_K")


@pytest.mark.parametrize(("level", "beside"), [("Q9", SAME), (AUTO, "Q9"), ("Q4_K", "auto"),
                                               ("\x1b[2J", SAME)])  # fmt: skip
def test_levels_that_there_are_not_are_refused(level, beside):
    with pytest.raises(CheckpointError, match="there is no such level") as caught:
        resolve(level, pairs("Q4_K"), ORDER, 0, unconditional=beside)
    assert "\x1b" not in str(caught.value)
    assert "Q3_K" in str(caught.value)


def test_copies_of_two_models_are_no_pair():
    from ideogram4_quant.checkpoint import ModelConfig

    small = Header("Q4_K", UNCOND, config=ModelConfig(num_layers=4))
    with pytest.raises(PairMismatchError, match="goes with an unconditional one of Q4_K"):
        resolve(INT8, catalogue(a=Header(INT8, COND), b=small), ORDER, 0, unconditional="Q4_K")


def test_files_that_say_nothing_are_not_taken_for_a_copy():
    unsure = Header(INT8, COND, copy_assumed=True)
    files = pairs("Q4_K", x=unsure, y=unsure)
    with pytest.raises(CheckpointError, match="no INT8 W8A8 rotated file"):
        resolve(INT8, files, ORDER, 0, unconditional="Q4_K")
    assert resolve(AUTO, files, ORDER, 10**12).label == "Q4_K"
    alone = pairs("Q4_K", x=unsure)
    assert resolve(INT8, alone, ORDER, 0, unconditional="Q4_K").conditional.name == "x"


def label(memory: float, files, **how) -> str:
    return resolve(AUTO, files, ORDER, round(memory), **how).label


def test_auto_pairs_two_levels_where_two_equal_ones_do_not_fit():
    files = pairs(INT8, "Q6_K", "Q5_K", "Q4_K")
    beside = WORKING_MEMORY
    assert label(20 * GB + beside, files) == INT8
    assert label(20 * GB + beside - 1, files) == f"{INT8} + Q6_K"
    assert label(18 * GB + beside, files) == f"{INT8} + Q6_K"
    assert label(18 * GB + beside - 1, files) == "Q6_K"  # no room to raise the conditional copy
    assert label(16 * GB + beside - 1, files) == "Q6_K + Q5_K"
    assert label(15 * GB + beside - 1, files) == "Q5_K"
    assert label(14 * GB + beside - 1, files) == "Q5_K + Q4_K"
    assert label(13 * GB + beside - 1, files) == "Q4_K"
    both = pairs(INT8, "Q4_K")
    assert label(16 * GB + beside, both) == f"{INT8} + Q4_K"
    assert label(16 * GB + beside - 1, both) == "Q4_K"
    assert label(11 * GB + beside, both) == INT8  # one at a time, whichever are paired


def test_auto_raises_the_conditional_copy_alone():
    """Never the other one, and never to a level that is less faithful or tried later."""
    files = pairs("Q4_K", x=Header("NVFP4", BOTH, 2 * GB), y=Header("BF16", BOTH, 40 * GB))
    assert label(12 * GB + WORKING_MEMORY, files) == "Q4_K"
    assert label(26 * GB + WORKING_MEMORY, files) == "Q4_K"  # BF16 is slower here


def test_auto_takes_a_pair_of_two_levels_before_half_a_model():
    files = catalogue(a=Header(INT8, COND, 10 * GB), b=Header("Q4_K", UNCOND, 6 * GB))
    for memory in (10**12, 12 * GB, 0):
        assert label(memory, files) == f"{INT8} + Q4_K"
    assert label(10**12, files, one_copy=True) == INT8
    whole = pairs("Q5_K", a=Header(INT8, COND, 10 * GB))
    assert label(10**12, whole) == f"{INT8} + Q5_K"


def test_auto_with_an_unconditional_level_takes_the_first_that_fits_beside_it():
    files = pairs(INT8, "Q5_K", "Q4_K")
    assert label(10**12, files, unconditional="Q4_K") == f"{INT8} + Q4_K"
    assert label(13 * GB + WORKING_MEMORY, files, unconditional="Q4_K") == "Q5_K + Q4_K"
    assert label(12 * GB + WORKING_MEMORY, files, unconditional="Q4_K") == "Q4_K"
    assert label(10**12, files, unconditional=INT8) == INT8


@pytest.mark.parametrize("order", AUTO_ORDER.values())
def test_the_conditional_copy_is_the_more_faithful_one_and_tried_before(order):
    found = list(two_levels(order))
    assert found
    for first, second in found:
        assert PAIRED.index(first) < PAIRED.index(second)
        assert order.index(first) < order.index(second)
    lower = [order.index(second) for _, second in found]
    assert lower == sorted(lower)
    assert set(PAIRED) <= set(LEVELS)


def test_the_ladder_is_the_measured_one():
    """Latent SQNR of two copies at each level on the clean pocket model, docs/pairs.csv."""
    import csv
    from pathlib import Path

    from ideogram4_quant.checkpoint import level_order

    table = Path(level_order.__file__).parents[1] / "docs" / "pairs.csv"
    rows = csv.DictReader(table.read_text("utf-8").splitlines())
    measured = {
        row["conditional"]: float(row["dB"])
        for row in rows
        if (row["model"], row["setting"]) == ("clean", "guidance 7")
        and row["conditional"] == row["unconditional"]
    }
    ladder = [measured[level] for level in PAIRED if level != "BF16"]
    assert ladder == sorted(ladder, reverse=True)


def test_help_page_says_what_auto_takes_of_the_released_sizes():
    from pathlib import Path

    from ideogram4_quant.cards.sizes import copy_bytes
    from ideogram4_quant.checkpoint import level_order
    from ideogram4_quant.checkpoint.pairs import ALTERNATING, residency

    page = Path(level_order.__file__).parents[1] / "web/docs/Ideogram4QuantLoad.md"
    lines = page.read_text("utf-8").splitlines()
    start = lines.index("| files of both copies | 8 GB | 12 GB | 16 GB | 20 GB | 24 GB |") + 2
    for line in lines[start : start + 2]:
        levels, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        files = catalogue(
            **{
                f"{level}-{copies[0]}": Header(level, copies, copy_bytes(level))
                for level in levels.split(", ")
                for copies in (COND, UNCOND)
            }
        )
        for size, cell in zip((8, 12, 16, 20, 24), cells, strict=True):
            found = resolve(AUTO, files, ORDER, size << 30)
            turns = residency(found.weight_bytes(), size << 30) == ALTERNATING
            assert found.label + (", by turns" if turns else "") == cell
