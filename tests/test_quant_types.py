"""Types by rule and by target size: exact sizes, least loss, and calibrated importance."""

import itertools
import json
import math
from dataclasses import replace

import gguf
import pytest
import torch

from ideogram4_quant.cli import main
from ideogram4_quant.quant import (
    QuantOptionError,
    QuantOptions,
    TypeRule,
    plan_quantization,
    quantize_checkpoint,
)
from ideogram4_quant.quant.block_types import LADDER, header_reserve, spend
from ideogram4_quant.quant.calibration import Calibration
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.tests import quant_model as model

FRAGILE = "layers.1.attention.o"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "bf16.safetensors", model.weights())


@pytest.fixture(scope="module")
def inputs():
    """Heavy-tailed inputs [tokens, K] of every block linear."""
    generator = torch.Generator().manual_seed(3)
    weights = model.weights()
    made = {}
    for name in model.linear_names():
        k = weights[f"{name}.weight"].shape[1]
        scale = torch.randn(k, generator=generator).mul(1.5).exp()
        made[name] = torch.randn(512, k, generator=generator) * scale
    return made


@pytest.fixture(scope="module")
def calibration(inputs):
    weights = model.weights()
    layers = {}
    for name, x in inputs.items():
        stats = LayerStats.of(x[:256], weights[f"{name}.weight"].float())
        noise = {"Q8_0": 1e-6, "Q6_K": 1e-5, "Q5_K": 1e-4, "Q4_K": 4e-4}
        factor = 100 if name == FRAGILE else 1
        layers[f"conditional.{name}"] = replace(
            stats,
            signal=torch.ones(1, dtype=torch.float64),
            noise={t: torch.tensor([n * factor], dtype=torch.float64) for t, n in noise.items()},
        )
    return Calibration(layers, times=(0.5,))


def types_of(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def test_a_users_rules_give_linears_another_type(tmp_path, source):
    out = tmp_path / "q.gguf"
    options = QuantOptions(types=(TypeRule("layers.0.*.w2", "Q5_K"), TypeRule("*.w2", "Q6_K")))
    quantize_checkpoint(source, "Q4_K", out, options=options)
    types = types_of(out)
    assert types["layers.0.feed_forward.w2.weight"] == "Q5_K"  # the first rule that matches
    assert types["layers.1.feed_forward.w2.weight"] == "Q6_K"
    assert types["layers.1.attention.o.weight"] == "Q4_K"
    recipe = json.loads(gguf.GGUFReader(out).fields["ideogram4.quantization"].contents())
    assert recipe["other_types"]["Q5_K"] == ["layers.0.feed_forward.w2"]


def test_an_old_command_line_with_a_policy_says_what_to_do(tmp_path, source, capsys):
    out = tmp_path / "q.gguf"
    line = ["quantize", str(source), "--level", "Q4_K", "--out", str(out)]
    assert main([*line, "--policy", "fragile"]) != 0
    said = capsys.readouterr().err
    assert "fragile" in said
    assert "--target-gb" in said
    assert "--calibration" in said
    assert not out.exists()


def size_range(source, tmp_path, options):
    sizes = []
    for level in ("Q4_K", "Q8_0"):
        plan = plan_quantization(source, level, tmp_path / "q.gguf", options=options)
        sizes.append(plan.nbytes)
    reserve = header_reserve(len(model.shapes()))
    return sizes[0] + reserve, sizes[1] + reserve


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.93])
def test_the_file_is_as_large_as_asked_and_hardly_smaller(
    tmp_path, source, calibration, share, calibrated
):
    options = QuantOptions(types=(TypeRule("layers.0.*.w1", "Q5_0"),))
    low, high = size_range(source, tmp_path, options)
    target = round(low + share * (high - low))
    options = replace(options, target_bytes=target, calibration=calibration if calibrated else None)
    out = tmp_path / "q.gguf"
    quantize_checkpoint(source, "Q4_K", out, options=options, overwrite=True)
    size = out.stat().st_size
    assert size <= target
    types = types_of(out)
    assert types["layers.0.feed_forward.w1.weight"] == "Q5_0"
    # what is left is less than the cheapest step up, and the header's reserve
    cheapest = 256 * 256 // 256 * (176 - 144)
    assert size > target - header_reserve(len(model.shapes())) - 8 * cheapest


def test_calibrated_errors_decide_who_gets_more(tmp_path, source, calibration):
    low, high = size_range(source, tmp_path, None)
    options = QuantOptions(target_bytes=low + (high - low) // 8, calibration=calibration)
    out = tmp_path / "q.gguf"
    quantize_checkpoint(source, "Q4_K", out, options=options)
    types = types_of(out)
    ranks = {name: LADDER.index(types[f"{name}.weight"]) for name in model.linear_names()}
    assert ranks[FRAGILE] == max(ranks.values()) > min(ranks.values())


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_near_the_best_of_all(seed):
    """Against every combination: never over budget, at most a few per cent above the optimum."""
    generator = torch.Generator().manual_seed(seed)
    rungs = {}
    for i in range(6):
        weights = int(torch.randint(1, 9, (1,), generator=generator)) * 1000
        losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        sizes = [0.56, 0.69, 0.82, 1.06]
        rungs["c", str(i)] = [
            (round(s * weights), loss, t) for s, loss, t in zip(sizes, losses, LADDER, strict=False)
        ]
    base = sum(options[0][0] for options in rungs.values())
    top = sum(options[-1][0] for options in rungs.values())
    for share in (0.1, 0.3, 0.7):
        budget = round(share * (top - base))
        chosen = spend(rungs, budget)
        picked = {k: next(o for o in rungs[k] if o[2] == t) for k, t in chosen.items()}
        assert sum(o[0] for o in picked.values()) <= base + budget
        found = sum(o[1] for o in picked.values())
        best = min(
            sum(o[1] for o in combination)
            for combination in itertools.product(*rungs.values())
            if sum(o[0] for o in combination) <= base + budget
        )
        assert found <= best * 1.15 + 1e-9
    assert set(spend(rungs, 0).values()) == {LADDER[0]}
    assert set(spend(rungs, top - base).values()) == {LADDER[3]}


@pytest.mark.parametrize("level", ["Q8_0", "Q6_K", "Q5_K", "Q4_K"])
def test_calibration_lowers_the_output_error_at_the_same_size(
    tmp_path, source, inputs, calibration, level
):
    weights = model.weights()
    outs = {}
    for name, given in (("plain", None), ("led", calibration)):
        outs[name] = tmp_path / f"{name}.gguf"
        options = QuantOptions(calibration=given)
        quantize_checkpoint(source, level, outs[name], options=options)
    found = {}
    for name, path in outs.items():
        reader = gguf.GGUFReader(path)
        found[name] = {t.name: t for t in reader.tensors}
        recipe = json.loads(reader.fields["ideogram4.quantization"].contents())
        assert recipe["scales"] == (
            "least error" if name == "plain" else "least output error on calibrated inputs"
        )
    for name, x in inputs.items():
        true = weights[f"{name}.weight"].float()
        errors = {}
        for which, tensors in found.items():
            t = tensors[f"{name}.weight"]
            assert t.tensor_type.name == level
            dense = gguf.quants.dequantize(t.data, t.tensor_type).reshape(true.shape)
            errors[which] = (x[256:] @ (torch.from_numpy(dense) - true).T).square().sum().item()
        assert 10 * math.log10(errors["plain"] / errors["led"]) > 0.5, name


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("INT8 W8A8", {"target_bytes": 10**6}, "for GGUF levels"),
        ("Q4_0", {"target_bytes": 10**7}, "levels it can mix"),
        ("Q4_K", {"target_bytes": 10**5}, r"below that of Q4_K.*needed at least"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, source, level, options, message):
    out = tmp_path / ("q.gguf" if level.startswith("Q") else "q.safetensors")
    with pytest.raises(QuantOptionError, match=message):
        plan_quantization(source, level, out, options=QuantOptions(**options))


def test_a_device_that_is_not_there_is_refused(tmp_path, source):
    for device in ("cuda:77", "meta", "warp"):
        with pytest.raises(QuantOptionError, match="cannot encode on this device"):
            quantize_checkpoint(source, "Q4_K", tmp_path / "q.gguf", device=device)
    assert list(tmp_path.iterdir()) == []
