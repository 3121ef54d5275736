"""Types by rule, and calibrated importance."""

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
    quantize_checkpoint,
)
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


def test_a_device_that_is_not_there_is_refused(tmp_path, source):
    for device in ("cuda:77", "meta", "warp"):
        with pytest.raises(QuantOptionError, match="cannot encode on this device"):
            quantize_checkpoint(source, "Q4_K", tmp_path / "q.gguf", device=device)
    assert list(tmp_path.iterdir()) == []
