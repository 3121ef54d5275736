"""The simulation of fetched weights against sums made by hand, and what it says of six cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from ideogram4_quant.cards import sizes, streaming
from ideogram4_quant.cards.block import LAYERS, block_seconds
from ideogram4_quant.cards.known import CARDS, card
from ideogram4_quant.cards.picture import QUALITY
from ideogram4_quant.cards.streaming import ahead, one_by_one, simulate, step

DOCS = Path(streaming.__file__).parents[1] / "docs" / "streaming.md"


def seconds(events, fetch, run) -> float:
    return simulate(list(events), lambda _: fetch, lambda _: run)


@pytest.mark.parametrize(("fetch", "run"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_a_block_ahead_only_the_first_fetch_or_the_last_run_shows(fetch, run):
    longer, shorter = max(fetch, run), min(fetch, run)
    assert seconds(ahead(10, range(10)), fetch, run) == pytest.approx(10 * longer + shorter)


def test_what_is_on_the_device_runs_meanwhile():
    """Every second block fetched, 4 s a fetch, 2 s a run: beside 20 s of fetches 4 s show."""
    assert seconds(ahead(10, range(0, 10, 2)), 4.0, 2.0) == pytest.approx(20 + 2 + 2)
    assert seconds(ahead(10, ()), 4.0, 2.0) == pytest.approx(20)


def test_weight_by_weight_a_stream_waits_for_the_weight_before_the_last():
    """Three operations, 1 s a run, 3 s a fetch: the third fetch waits for the first run."""
    events = list(one_by_one(3, range(3)))
    assert events == [
        ("fetch", 0, None), ("run", 0, 0), ("fetch", 1, None), ("run", 1, 1),
        ("fetch", 2, 0), ("run", 2, 2),
    ]  # fmt: skip
    assert simulate(events, lambda _: 3.0, lambda _: 1.0) == pytest.approx(10)
    # a run of 5 s between short ones: the fetch of 4 s that could hide under it hides; no other
    runs = (1.0, 5.0, 1.0)
    assert simulate(events, lambda _: 4.0, runs.__getitem__) == pytest.approx(8 + 5 + 1)


def test_an_event_that_waits_for_nothing_known_is_an_error():
    with pytest.raises(KeyError):
        simulate([("run", 0, 0)], lambda _: 1.0, lambda _: 1.0)


@pytest.mark.parametrize("one", CARDS, ids=lambda c: c.name)
@pytest.mark.parametrize("level", streaming.LEVELS)
def test_a_step_takes_little_more_than_the_longer_of_work_and_transfers(one, level):
    found = step(one, level)
    work = sum(LAYERS * block_seconds(one, level, tokens).total for tokens in QUALITY.copies)
    moved = one.transfer_seconds(2 * LAYERS * sizes.block_bytes(level))
    assert found.compute == pytest.approx(work)
    assert found.transfer == pytest.approx(moved)
    assert found.bound < found.ahead <= 1.05 * found.bound
    assert found.one_by_one >= found.bound * 0.9999


def test_operations_take_what_their_block_takes():
    for one in CARDS:
        shares = streaming._shares(one, "Q4_K", 4096, streaming.FUSED)
        assert sum(shares.values()) == pytest.approx(block_seconds(one, "Q4_K", 4096).total)


def test_the_document_has_the_table():
    assert "\n".join(streaming.table()) in DOCS.read_text(encoding="utf-8")
    assert card("RTX 3090") in CARDS
