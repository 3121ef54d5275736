"""The study of pairs: its sampling against the engine's own, its causes against hand-made cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ideogram4_quant.cards.sizes import copy_bytes
from ideogram4_quant.engine.generate import GenerateRequest, Models, sample
from ideogram4_quant.engine.linear import QuantLinear
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.pocket.pairs import why
from ideogram4_quant.pocket.pairs.copies import Copies, exact
from ideogram4_quant.pocket.pairs.report import Row, Rows, as_csv, same_bytes_table, shown, weigh
from ideogram4_quant.pocket.pairs.settings import (
    BOTH_WAYS,
    INT8,
    LEVELS,
    SAME_BYTES,
    WHOLE,
    Setting,
    pairs_of,
)
from ideogram4_quant.pocket.pairs.walk import GRID, batches, both, finals
from ideogram4_quant.pocket.table.models import VARIANTS, in_memory, state_of
from ideogram4_quant.pocket.table.painting import cases_of_part

CLEAN = VARIANTS[0]


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Copies:
    return Copies(CLEAN, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def batch():
    return batches(cases_of_part(0)[:1])


def test_what_guidance_makes_of_scaled_copies():
    """pocket/README.md: at 7 the shipped copies are guided by 1.5 of their own scale."""
    assert Setting(7.0).factors == (7.0, 6.0)
    assert Setting(7.0).true_factors == pytest.approx((1.5, 0.5))
    assert Setting(1.5, own_scale=True).factors == pytest.approx((7.0, 6.0))
    for guidance in (3.0, 7.0):
        true = Setting(guidance, own_scale=True).true_factors
        assert true == pytest.approx((guidance, guidance - 1))
    assert weigh(Setting(7.0)) == pytest.approx(9.54, abs=0.01)
    assert weigh(Setting(7.0, own_scale=True)) == pytest.approx(1.34, abs=0.01)


@torch.inference_mode()
def test_final_latents_are_the_engines(copies, batch):
    models = exact(copies)
    steps = GenerateRequest("", 128, 64, preset="default", guidance=3.0).plan()
    prepared = prepare(models[0], *GRID, batch[0].features), prepare(models[1], *GRID)
    *_, (_, wanted) = sample(Models(*models, None, None), steps, batch[0].noise, *prepared)
    found = finals(models, Setting(3.0).factors, batch)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@torch.inference_mode()
def test_own_scale_undoes_that_of_the_last_layer(copies, batch):
    """`export.for_presets` scaled the last linear by 1.5 / 7 and by 0.5 / 6."""
    pair = both(exact(copies), Setting(5.0, own_scale=True).factors, batch[0])
    found = pair.velocities(batch[0].noise, 0.4)
    for copy, scale, factor, prepared, v in zip(
        ("conditional", "unconditional"), (7 / 1.5, 6 / 0.5), (5.0, 4.0), pair.prepared, found,
        strict=True,
    ):  # fmt: skip
        state = {
            name: t.float() * scale if name.startswith("final_layer.linear.") else t
            for name, t in state_of(CLEAN, copy).items()
        }
        model = load_transformer(in_memory(CLEAN, state), copy, device="cpu")
        wanted = factor * velocity(model, batch[0].noise, 0.4, prepared)
        assert (v - wanted).norm() < 1e-4 * wanted.norm()


def test_rows_of_the_text_have_a_weight_of_their_own():
    text, image = (QuantLinear(torch.full((2, 3), value), None) for value in (1.0, 10.0))
    linear = why.RowsLinear(text, image)
    linear.tokens = 2
    found = linear(torch.ones(1, 5, 3))
    assert found[0, :, 0].tolist() == [3.0, 3.0, 30.0, 30.0, 30.0]
    assert linear(torch.ones(1, 1, 3))[0, 0, 0] == 30  # the modulation


@torch.inference_mode()
def test_errors_along_the_exact_path_are_those_of_each_copy(copies, batch, monkeypatch):
    """With one step there is nothing to feed back: what enters is what is left."""
    setting = Setting(3.0)
    one = GenerateRequest("", 128, 64, preset="default").plan()[:1]
    monkeypatch.setattr(why, "steps", lambda: one)
    monkeypatch.setattr("ideogram4_quant.pocket.pairs.walk.steps", lambda: one)
    found = why.errors(copies, "Q4_K", setting, batch)
    truth = finals(exact(copies), setting.factors, batch)
    for copy, pair in (("conditional", ("Q4_K", "BF16")), ("unconditional", ("BF16", "Q4_K"))):
        left = (finals(copies.pair(*pair), setting.factors, batch) - truth).double().flatten(1)
        sign = 1 if copy == "conditional" else -1
        assert (found.summed(copy) - sign * left).norm() < 1e-3 * left.norm()
    figures = found.figures(setting)
    assert figures["image exact"][0] < figures["text exact"][0] <= 1.0
    assert abs(figures["cosine"][0]) < 0.5
    assert figures["entering"][0] - figures["own error"][0] == pytest.approx(weigh(setting))
    parts = [found.energy(c) for c in why.COPIES]
    assert figures["entering"][0] == pytest.approx(float(10 * (parts[0] / parts[1]).log10()))


def test_pairs_of_a_group_take_the_same_bytes_of_the_released_model():
    for sick in (False, True):
        for first, second in pairs_of(sick, WHOLE):
            assert first in LEVELS
            assert second in LEVELS or second.startswith("LoRA of rank")
    for group in SAME_BYTES:
        found = [copy_bytes(first) + copy_bytes(second) for first, second in group]
        assert max(found) < 1.04 * min(found), group


def test_tables_say_what_was_measured():
    values = (30.0, 31.0, 32.0, 33.0, 31.0, 32.0)
    rows = Rows(
        Row("clean", WHOLE, pair, 10**7, tuple(v - i for v in values))
        for i, pair in enumerate(BOTH_WAYS)
    )
    better = rows.find("clean", WHOLE, (INT8, "Q4_K"))
    assert shown(better.interval).startswith("31.5 ± ")
    table = same_bytes_table(rows)
    assert f"| INT8 W8A8 rotated + Q4_K | 10.0 | {shown(better.interval)} |" in table
    line = as_csv(rows).splitlines()[1]
    assert line.startswith("clean,guidance 7,INT8 W8A8 rotated,Q4_K,10000000,31.50,")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from ideogram4_quant.pocket.pairs import measured

    made = []
    fake = SimpleNamespace(pair=lambda *p: p, digest=lambda *p: " ".join(p))
    monkeypatch.setattr(measured, "Copies", lambda *_: fake)
    monkeypatch.setattr(measured, "exact", lambda _: ("exact",))

    def latents(models, factors, parts):
        made.append(models)
        return torch.ones(2, 3, 4) * (1 + len(models) / 10)

    monkeypatch.setattr(measured, "finals", latents)
    for _ in range(2):
        table = measured.PairTable(CLEAN, (), tmp_path)
        assert len(table.decibels(WHOLE, ("Q4_K", INT8), ())) == 2
    assert made == [("exact",), ("Q4_K", INT8)]
