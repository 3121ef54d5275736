"""Allocation: against every combination; errors of candidates, and the files of sensitivities."""

import itertools
import json

import pytest
import torch

from ideogram4_quant.quant.allocation import Rung, allocate, without
from ideogram4_quant.quant.candidate_errors import candidate_errors
from ideogram4_quant.quant.errors import CalibrationError
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.quant.sensitivity import Sensitivity, Sums, default_gain
from ideogram4_quant.quant.storage import STORAGES, storage_encoding

COPIES = ("conditional", "unconditional")


def inputs_of(k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(k // 4, k, generator=generator)
    own = 0.3 * torch.randn(600, k, generator=generator)
    return torch.randn(600, k // 4, generator=generator) @ mixed / k**0.5 + own


# ---- allocation


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_near_the_best_of_all(seed):
    """Against every combination: never over budget, and no further off than one step is worth."""
    generator = torch.Generator().manual_seed(seed)
    rungs = {}
    for i in range(6):
        weights = int(torch.randint(1, 9, (1,), generator=generator)) * 1000
        losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        sizes = zip((0.56, 0.69, 0.82, 1.06), losses, "abcd", strict=True)
        rungs["c", str(i)] = [Rung(round(s * weights), loss, name) for s, loss, name in sizes]
    base = sum(options[0].nbytes for options in rungs.values())
    top = sum(options[-1].nbytes for options in rungs.values())
    for share in (0.1, 0.3, 0.7):
        budget = base + round(share * (top - base))
        chosen = allocate(rungs, budget)
        assert sum(rung.nbytes for rung in chosen.values()) <= budget
        found = sum(rung.loss for rung in chosen.values())
        best = min(
            sum(rung.loss for rung in combination)
            for combination in itertools.product(*rungs.values())
            if sum(rung.nbytes for rung in combination) <= budget
        )
        assert found <= best * 1.15 + 1e-9
    assert {rung.name for rung in allocate(rungs, base).values()} == {"a"}
    assert {rung.name for rung in allocate(rungs, top).values()} == {"d"}


def test_a_larger_storage_that_loses_more_is_never_chosen():
    rungs = {("c", "x"): [Rung(10, 1.0, "a"), Rung(20, 2.0, "b"), Rung(30, 1.0, "c")]}
    assert allocate(rungs, 100)["c", "x"].name == "a"


def test_a_storage_is_left_out_only_where_the_rest_fits():
    rungs = {("c", n): [Rung(10, 2.0, "W4A4"), Rung(12, 1.0, "a")] for n in "xy"}
    assert {r.name for own in without(rungs, "W4A4", 24).values() for r in own} == {"a"}
    assert without(rungs, "W4A4", 23) == rungs
    rungs["c", "z"] = rungs["c", "x"][:1]
    assert without(rungs, "W4A4", 100) == rungs


# ---- errors of candidates


@pytest.mark.parametrize("container", ["native", "gguf"])
def test_foretold_errors_are_those_of_outputs_on_other_inputs(container):
    k = 512
    weight = torch.randn(96, k, generator=torch.Generator().manual_seed(1))
    x = inputs_of(k, 3)
    stats = LayerStats.of(x[:500], weight)
    from ideogram4_quant.quant.input_moments import block_sums

    stats = LayerStats(**{**vars(stats), "blocks": block_sums(x[:500])})
    names = STORAGES[container]
    found = candidate_errors(weight, names, container, stats, None)
    for name in names:
        encoding = storage_encoding(name, container, tuple(weight.shape))
        led = encoding.led_by(stats.moments, feedback=True)
        back = encoding.decode(led.encode(weight))
        true = x[:500] @ weight.T
        lost = (x[:500] @ (back - weight).T).square().sum() / true.square().sum()
        measured = found[name].weight
        if name == "BF16":
            assert measured < 1e-4
        else:
            assert abs(10 * torch.log10(lost / measured)) < 0.3, name


def test_rows_that_a_storage_does_not_fit_are_not_offered():
    found = candidate_errors(torch.randn(8, 96), STORAGES["gguf"], "gguf", None, None)
    assert set(found) == {"IQ4_NL", "Q8_0", "BF16"}


# ---- files of sensitivities


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 1},  # without gains of inputs
        {"linears": []},
        {"linears": {"a": [1, 2, 3]}},
        {"linears": {"a": [1, float("nan"), *[1.0] * 6]}},
        {"linears": {"a": [0, *[1.0] * 7]}},
        {"linears": {"a": [1, -1.0, -1.0, *[1.0] * 5]}},
        {"linears": {"a": [1, 1.0, 1e4, *[1.0] * 5]}},
        {"linears": {"a": [1, *[1.0] * 6, -1.0]}},
        {"models": {"conditional": 3}},
        {"done": [1]},
    ],
)
def test_damaged_sensitivities_are_refused(tmp_path, change):
    path = tmp_path / "s.json"
    sums = Sums.of([1, *[1.0] * 7])
    Sensitivity({"conditional.x": sums}, {"conditional": "a"}).save(path)
    assert Sensitivity.load(path).linears == {"conditional.x": sums}
    record = json.loads(path.read_text()) | change
    path.write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match=r"s\.json"):
        Sensitivity.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CalibrationError, match="JSON"):
        Sensitivity.load(path)


def test_the_built_in_table_has_the_order_that_was_measured():
    kinds = ("feed_forward.w2", "feed_forward.w1", "feed_forward.w3", "attention.qkv")
    for copy in COPIES:
        gains = [default_gain(copy, f"layers.3.{kind}", 34).weight for kind in kinds]
        assert gains == sorted(gains, reverse=True)
        assert min(default_gain(copy, "layers.3.attention.o", 4)) > 0
    assert default_gain("conditional", "layers.0.feed_forward.w2", 34) > default_gain(
        "unconditional", "layers.0.feed_forward.w2", 34
    )
