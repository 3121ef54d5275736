"""Moments of inputs from sums, and what every level does with them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.ops.linear import linear
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant import (
    Calibration,
    CalibrationError,
    LayerStats,
    QuantOptionError,
    QuantOptions,
    Run,
    quantize_checkpoint,
    verify_file,
)
from ideogram4_quant.quant.encodings import Blocks, NativeInt8, SmoothInt8
from ideogram4_quant.quant.input_moments import DIRECTIONS, InputMoments, input_moments, signs
from ideogram4_quant.quant.provenance import hash_files
from ideogram4_quant.tests import quant_model as model

W2 = "layers.0.feed_forward.w2"


def correlated(features, tokens, seed=0, factors=6):
    """Inputs [tokens, features] that ``factors`` hidden ones drive, with noise and a mean."""
    of_weights = torch.Generator().manual_seed(features)
    mixing = torch.randn(factors, features, generator=of_weights)
    mean = torch.randn(features, generator=of_weights)
    generator = torch.Generator().manual_seed(seed)
    driven = torch.randn(tokens, factors, generator=generator) @ mixing
    return driven + mean + 0.3 * torch.randn(tokens, features, generator=generator)


# ---- moments


def test_directions_are_most_of_the_covariance_and_never_more():
    x = correlated(192, 3000).double()
    found = LayerStats.of(x.float(), torch.ones(4, 192)).moments
    true = x.T @ x / len(x)
    explained = found.directions.double() @ found.directions.double().T
    torch.testing.assert_close(found.square, true.diagonal().float())
    left = torch.linalg.eigvalsh(true - explained)
    assert left.min() > -1e-3 * true.trace()
    assert left.abs().sum() < 0.05 * true.trace()
    weight = torch.randn(5, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = (x @ weight.T).square().mean(0).sum().item()
    assert found.output_energy(weight) == pytest.approx(wanted, rel=0.02)


def test_signs_are_the_same_ones_always():
    assert signs(3, 8).tolist() == [
        [1, 1, 1, -1, -1, 1, -1, -1],
        [1, 1, -1, 1, -1, 1, -1, -1],
        [1, 1, -1, 1, 1, 1, 1, -1],
    ]  # a stored sketch is read with these
    assert signs(4608, DIRECTIONS).mean().abs() < 0.01


def test_moments_of_treated_inputs_are_theirs():
    x = correlated(256, 2000)
    factors = torch.rand(256, generator=torch.Generator().manual_seed(2)) + 0.5
    found = LayerStats.of(x, torch.ones(4, 256)).moments.scaled(factors).rotated(64)
    treated = rotate(x * factors, 64)
    torch.testing.assert_close(found.square, treated.square().mean(0), rtol=0.1, atol=0)
    weight = torch.randn(9, 256, generator=torch.Generator().manual_seed(3))
    wanted = (treated @ weight.T).square().mean(0).sum().item()
    assert found.output_energy(weight) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("qtype", ["Q4_K", "Q8_0"])
def test_inputs_that_were_silent_keep_their_weights(qtype):
    """Another prompt may wake them: no errors are piled onto them for a little gain."""
    x = correlated(256, 3000)
    silent = torch.arange(256) % 4 == 1
    x[:, silent] *= 1e-3
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    moments = LayerStats.of(x, weight).moments
    form = Blocks(qtype, (64, 256))

    def errors(encoding):
        return encoding.decode(encoding.encode(weight)) - weight

    plain = errors(form.led_by(moments, feedback=False))
    fed = errors(form.led_by(moments, feedback=True))
    undamped = errors(replace(form, importance=moments.square, feedback=moments.feedback()))
    assert moments.output_energy(fed) < moments.output_energy(plain) / 3
    assert fed[:, silent].square().mean() < 1.3 * plain[:, silent].square().mean()
    assert undamped[:, silent].square().mean() > 5 * plain[:, silent].square().mean()


def test_silence_has_no_moments_and_one_token_has_one_direction():
    silent = LayerStats.of(torch.zeros(5, 32), torch.ones(2, 32))
    assert silent.moments is None
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    found = LayerStats.of(x, torch.ones(2, 32)).moments
    assert found.directions.shape == (32, 1)
    torch.testing.assert_close(found.directions.abs()[:, 0], x.abs()[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("orthogonal", [False, True])  # to the signs: nothing but rounding is left
def test_sums_that_contradict_each_other_explain_no_more_than_all(size, orthogonal):
    generator = torch.Generator().manual_seed(5)
    square = torch.rand(64, dtype=torch.float64, generator=generator)
    sketch = torch.rand(64, DIRECTIONS, dtype=torch.float64, generator=generator)
    if orthogonal:
        known = signs(64, DIRECTIONS).double()
        sketch = sketch - known @ torch.linalg.lstsq(known, sketch).solution
    torch.set_flush_denormal(False)  # a library that an earlier test loaded may have set it
    assert torch.full((1,), size).mul(1).item() > 0
    found = input_moments(square, (sketch * size).float(), 10)
    weight = torch.randn(4, 64, generator=generator)
    assert (found.directions.square().sum(1) <= 1.02 * found.square).all()
    assert 0 < found.output_energy(weight) < 100 * weight.square().sum()
    codes, better = found.feedback().round(weight, torch.full((4, 1), 0.1), None, (-127, 127))
    nearest = (weight / 0.1).round()
    kept = torch.where(better[:, None], codes.float(), nearest)
    lost, loses = (found.output_energy(each * 0.1 - weight) for each in (nearest, kept))
    assert loses < lost if better.any() else loses == lost


def test_inputs_too_quiet_for_fp32_count_as_silent():
    x = correlated(32, 50) * 1e-16
    assert LayerStats.of(x, torch.ones(2, 32)).moments is None


# ---- INT8


@pytest.mark.parametrize("rotation", [None, 64, 256])
@pytest.mark.parametrize("smoothed", [False, True])
def test_int8_loses_less_of_the_output_at_the_same_scales(rotation, smoothed):
    x, fresh = correlated(256, 3000), correlated(256, 2000, seed=9)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(6))
    smooth = torch.rand(256, generator=torch.Generator().manual_seed(7)) + 0.5 if smoothed else None
    moments = LayerStats.of(x, weight).moments
    plain = NativeInt8(rotation, smooth)
    fed = plain.led_by(moments, feedback=True)
    before, after = plain.encode(weight), fed.encode(weight)
    assert torch.equal(before["weight_scale"], after["weight_scale"])
    wanted = fresh @ weight.T
    lost, loses = (
        (fresh @ plain.decode(parts).T - wanted).square().sum() for parts in (before, after)
    )
    assert loses < lost / 3
    if rotation is None:
        other = SmoothInt8(smooth).led_by(moments, feedback=True).encode(weight)
        assert torch.equal(other["wq"], after["weight"])


# ---- files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "s.safetensors", model.weights())


@pytest.fixture(scope="module")
def calibration(source):
    layers = {}
    for name in model.linear_names():
        weight = model.weights()[f"{name}.weight"]
        stats = LayerStats.of(correlated(weight.shape[1], 1500), weight)
        two = {"peaks": torch.zeros(3, 2).double(), "signal": torch.zeros(2).double()}
        layers[f"conditional.{name}"] = replace(stats, **two)
    (file,) = hash_files([source])
    run = Run({"conditional": file.sha256}, "", 1, (0,), 1, 128, 64)
    return Calibration(layers, (0.2, 0.7), (run,))


@pytest.mark.parametrize("level", ["INT8 W8A8", "INT8 W8A8 rotated", "Q8_0", "Q4_K"])
def test_files_of_every_level_are_nearer_in_their_outputs(level, source, calibration, tmp_path):
    suffix = "gguf" if level[0] == "Q" else "safetensors"
    weight = model.weights()[f"{W2}.weight"].float()
    fresh = correlated(768, 800, seed=8)
    wanted, lost, foretold, through = fresh @ weight.T, {}, {}, {}
    for rounding in ("nearest", "feedback"):
        out = tmp_path / f"{rounding}.{suffix}"
        options = QuantOptions(calibration=calibration, rounding=rounding)
        report = quantize_checkpoint(source, level, out, options=options)
        recipe = report.metadata.get("quantization") or report.metadata["ideogram4.quantization"]
        assert json.loads(recipe)["rounding"] == rounding
        stored = open_checkpoint(out).load("conditional", dtype=torch.float32)[f"{W2}.weight"]
        found = fresh @ stored.dequantize().T
        through[rounding] = (linear(fresh, stored) - wanted).square().sum().item()
        lost[rounding] = (found - wanted).square().sum().item()
        row = next(t for t in report.tensors if t.name == f"{W2}.weight")
        foretold[rounding] = row.output_db
        measured = 10 * torch.log10(wanted.square().sum() / lost[rounding]).item()
        # What no direction explains counts as uncorrelated: rather too much error than too little.
        assert measured - (4 if rounding == "feedback" else 1) < row.output_db < measured + 0.5
        assert "output dB" in report.table()
        again = verify_file(out, source, calibration=calibration)
        assert again.meter.output_db == pytest.approx(report.meter.output_db, abs=0.01)
    assert lost["feedback"] < lost["nearest"] / 2
    assert foretold["feedback"] > foretold["nearest"] + 3
    assert through["feedback"] < 0.9 * through["nearest"]  # int8 activations lose as much in both


def test_the_worst_are_worst_in_their_outputs_where_other_tensors_lose_too(calibration, tmp_path):
    """Norms, linears in bf16, and one that was not watched."""
    layers = dict(calibration.layers)
    del layers["conditional.layers.0.feed_forward.w3"]
    exact = {
        name: tensor.float() * (1.001 if name.startswith("layers.") else 1)  # more than bf16 holds
        for name, tensor in model.weights().items()
    }
    source = model.write(tmp_path / "fp32.safetensors", exact)
    known = replace(calibration, layers=layers)
    options = QuantOptions(calibration=known, protect=("layers.1.attention.*",))
    out = tmp_path / "q.safetensors"
    report = quantize_checkpoint(source, "INT8 W8A8", out, options=options)
    again = verify_file(out, source, calibration=known)
    assert not all(t.linear for t in again.worst(1000))
    for found in (report, again):
        lossy = [t for t in found.worst(1000) if t.linear]
        assert any("layers.1.attention" in t.name for t in lossy)
        lossy = [t for t in lossy if not t.name.endswith("layers.0.feed_forward.w3.weight")]
        outputs = [t.output_db for t in lossy]
        assert outputs == sorted(outputs)
        assert [t.sqnr_db for t in lossy] != sorted(t.sqnr_db for t in lossy)
    assert again.meter.output_db == pytest.approx(report.meter.output_db, abs=1e-3)


def test_one_step_says_too_little_to_follow(source, calibration, tmp_path, caplog):
    single = replace(calibration, times=(0.2,))
    plain, out = tmp_path / "plain.safetensors", tmp_path / "single.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", plain)
    quantize_checkpoint(source, "INT8 W8A8", out, options=QuantOptions(calibration=single))
    assert "rounded to nearest" in caplog.text
    wanted, found = load_file(plain), load_file(out)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_rounding_by_command_and_what_it_refuses(source, calibration, tmp_path, capsys):
    saved = tmp_path / "calibration.safetensors"
    calibration.save(saved)
    sums = {}
    for rounding in ("feedback", "nearest"):
        out = str(tmp_path / f"{rounding}.gguf")
        words = ["quantize", str(source), "--level", "Q4_K", "--out", out, "--rounding", rounding]
        assert main([*words, "--calibration", str(saved)]) == 0
        words = ["verify", out, "--against", str(source), "--calibration", str(saved), "--json"]
        capsys.readouterr()
        assert main(words) == 0
        sums[rounding] = json.loads(capsys.readouterr().out)
    assert sums["feedback"]["output_db"] > sums["nearest"]["output_db"] + 3
    assert sums["feedback"]["sqnr_db"] < sums["nearest"]["sqnr_db"]
    options = QuantOptions(calibration=calibration, rounding="up")
    with pytest.raises(QuantOptionError, match="unknown rounding"):
        quantize_checkpoint(source, "Q4_K", tmp_path / "x.gguf", options=options)


def test_a_calibration_of_another_model_foretells_nothing(source, calibration, tmp_path):
    other = model.write(tmp_path / "other.safetensors", model.weights(seed=3))
    with pytest.raises(CalibrationError, match="another model"):
        verify_file(other, other, calibration=calibration)


def test_moments_of_a_folded_file_are_those_of_its_inputs():
    moments = InputMoments(torch.full((64,), 2.0), torch.ones(64, 1))
    assert torch.equal(moments.scaled(torch.full((64,), 0.5)).square, torch.full((64,), 0.5))
    turned = moments.rotated(16)  # rows of H sum to sqrt(16), the mean goes to few channels
    assert turned.output_energy(rotate(torch.eye(64), 16)) == pytest.approx(128.0)
