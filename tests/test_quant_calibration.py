"""Calibration: its figures by formula, its file, merging, and files that must be refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ideogram4_quant.cli import main
from ideogram4_quant.errors import CheckpointError, TruncatedFileError
from ideogram4_quant.quant import (
    Calibration,
    CalibrationError,
    LayerStats,
    QuantOptions,
    Run,
    quantize_checkpoint,
)
from ideogram4_quant.quant.input_moments import block_sums
from ideogram4_quant.quant.provenance import hash_files
from ideogram4_quant.tests import quant_model as model

W2 = "layers.0.feed_forward.w2"


def run(**changes):
    known = Run({"conditional": "aa"}, "bb", 2, (0, 1), 4, 128, 64, {"torch": "2"})
    return replace(known, **changes)


def stats(seed=0, tokens=50, shape=(6, 16), columns=3, candidates=("int8", "Q4_K")):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape[1], generator=generator)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    positive = torch.rand(len(candidates) + 2, columns, generator=generator).double()
    return replace(
        LayerStats.of(x, weight),
        peaks=positive.new_tensor([[4.0] * columns, [12.0] * columns, [5.0] * columns]),
        signal=100 + positive[0],
        noise={name: positive[1 + i] for i, name in enumerate(candidates)},
    ), x


def calibration(seed=0, times=(0.0, 0.5, 0.9), **changes):
    layers = {f"conditional.{W2}": stats(seed, columns=len(times))[0]}
    return Calibration(layers, times, (run(**changes),))


def test_figures_are_the_formulas():
    found, x = stats()
    values = x.double().numpy()
    np.testing.assert_array_equal(found.absmax.numpy(), np.abs(x.numpy()).max(0))
    np.testing.assert_allclose(found.moments.square.numpy(), (values**2).mean(0), rtol=1e-6)
    centred = values - values.mean()
    wanted = (centred**4).mean() / (centred**2).mean() ** 2
    assert found.kurtosis == pytest.approx(wanted, rel=1e-9)
    assert found.peak_to_median.tolist() == [3.0] * 3
    noise, signal = found.noise["int8"].sum(), found.signal.sum()
    assert found.error("int8") == pytest.approx(math.sqrt(noise / signal))
    assert found.sqnr_db("int8") == pytest.approx(10 * math.log10(signal / noise))
    assert math.isnan(found.error("never measured"))


def test_kurtosis_of_impossible_sums_is_no_number():
    sums = torch.tensor([1e90, 1e180, 1e300, 1e300], dtype=torch.float64)
    assert not math.isfinite(replace(stats()[0], power_sums=sums).kurtosis)


def test_merged_runs_are_one_run_over_both_inputs():
    (first, x), (second, y) = stats(1), stats(2, tokens=7)
    both = Calibration({"conditional.a": first}, (0.0, 0.5, 0.9), (run(),)).merge(
        Calibration({"conditional.a": second}, (0.0, 0.5, 0.9), (run(seeds=(2,)),))
    )
    merged, wanted = both.layer("conditional", "a"), LayerStats.of(torch.cat([x, y]), x[:6])
    assert merged.tokens == 57
    assert torch.equal(merged.absmax, wanted.absmax)
    torch.testing.assert_close(merged.square_sum, wanted.square_sum, rtol=1e-15, atol=0)
    torch.testing.assert_close(merged.sketch, wanted.sketch, rtol=1e-5, atol=1e-3)
    assert merged.kurtosis == pytest.approx(wanted.kurtosis, rel=1e-12)
    assert torch.equal(merged.noise["int8"], first.noise["int8"] + second.noise["int8"])
    assert len(both.provenance) == 2


def test_runs_of_other_schedules_keep_their_own_columns():
    first, second = calibration(1, times=(0.0, 0.5)), calibration(2, (0.25, 0.5), seeds=(5,))
    both = first.merge(second)
    assert both.times == (0.0, 0.25, 0.5)
    a, b, found = (c.layer("conditional", W2).signal for c in (first, second, both))
    assert found.tolist() == [a[0], b[0], a[1] + b[1]]


def test_the_same_run_twice_and_runs_of_other_models_are_refused():
    first = calibration(1)
    with pytest.raises(CalibrationError, match="twice"):
        first.merge(first)
    with pytest.raises(CalibrationError, match=r"found sha256 cc, needed sha256 aa"):
        first.merge(calibration(2, models={"conditional": "cc"}))
    other = Calibration({f"conditional.{W2}": stats(shape=(6, 8))[0]}, first.times, (run(steps=9),))
    with pytest.raises(CalibrationError, match=r"found \[6, 8\], needed \[6, 16\]"):
        first.merge(other)


def test_a_file_gives_back_everything(tmp_path):
    known = calibration().merge(
        Calibration(
            {"conditional.layers.10.attention.o": stats(3, candidates=("int8",))[0]},
            (0.0, 0.5, 0.9),
            (run(prompts=9),),
        )
    )
    path = tmp_path / "c.safetensors"
    assert known.save(path) == path.stat().st_size
    found = Calibration.load(path)
    assert (found.times, found.provenance) == (known.times, known.provenance)
    assert list(found.layers) == list(known.layers)
    for key, wanted in known.layers.items():
        layer = found.layers[key]
        assert (layer.shape, layer.tokens) == (wanted.shape, wanted.tokens)
        for name in (
            "absmax",
            "square_sum",
            "sketch",
            "weight_absmax",
            "power_sums",
            "peaks",
            "signal",
        ):
            assert torch.equal(getattr(layer, name), getattr(wanted, name)), name
        assert layer.noise.keys() == wanted.noise.keys()
        assert all(torch.equal(layer.noise[n], wanted.noise[n]) for n in wanted.noise)
    with pytest.raises(CheckpointError, match="exists already"):
        known.save(path)


def damage(path, out, change=None, **metadata):
    """The file with one tensor or metadata value replaced (None: removed)."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = {**file.metadata(), **metadata}
    for name, value in (change or {}).items():
        tensors.pop(f"conditional.{W2}.{name}", None)
        if value is not None:
            tensors[f"conditional.{W2}.{name}"] = value
    save_file(tensors, out, {k: v for k, v in known.items() if v is not None})
    return out


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({}, {"format": "pt"}, "no calibration"),
        ({}, {"version": "99"}, "version '99'"),
        ({}, {"version": "1"}, "Make one with ideogram4-quant calibrate"),
        ({}, {"times": "[0.5, 0.1, 0.9]"}, "do not rise"),
        ({}, {"times": '[0.1, "x", 0.9]'}, "metadata times"),
        ({}, {"times": "[0.1, 0.2"}, "no usable JSON"),
        ({}, {"times": "[0.1]"}, "does not fit"),
        ({}, {"candidates": "5"}, "metadata candidates"),
        ({}, {"provenance": "[{}]"}, "provenance"),
        ({"absmax": None}, {}, "missing"),
        ({"absmax": torch.full((16,), torch.nan)}, {}, "NaN"),
        ({"absmax": -torch.ones(16)}, {}, "negative"),
        ({"absmax": torch.ones(15)}, {}, "square_sum does not fit"),
        ({"absmax": torch.ones(0)}, {}, "impossible"),
        ({"sketch": torch.ones(16, 4)}, {}, "sketch does not fit"),
        ({"sketch": torch.full((16, 16), torch.inf)}, {}, "NaN or infinity"),
        ({"shape": torch.tensor([6, 99])}, {}, "contradicts"),
        ({"tokens": torch.tensor([-1])}, {}, "negative"),
        ({"tokens": torch.tensor([0])}, {}, "impossible number of tokens"),
        ({"tokens": torch.tensor([2**63 - 1])}, {}, "impossible number of tokens"),
        (
            {"square_sum": torch.full((16,), 1e300, dtype=torch.float64)},
            {},
            "impossible mean square",
        ),
        ({"noise": torch.ones(2, 3)}, {}, "F32"),
        ({"extra": torch.ones(3)}, {}, "extra"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change, metadata, message):
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    bad = damage(path, tmp_path / "bad.safetensors", change, **metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        Calibration.load(bad)
    assert str(bad) in str(caught.value)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TruncatedFileError):
        Calibration.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Calibration.load(tmp_path / "none.safetensors")


# ---- which model it is of


def calibrated(weights, digest):
    layers = {
        f"conditional.{name}": LayerStats.of(torch.ones(1, w.shape[1]), w)
        for name in model.linear_names()
        for w in [weights[f"{name}.weight"]]
    }
    return Calibration(layers, (0.0,), (run(models={"conditional": digest}),))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model.write(tmp_path_factory.mktemp("source") / "s.safetensors", model.weights())


def test_a_calibration_of_the_same_file_and_of_the_same_weights_passes(tmp_path, source):
    (file,) = hash_files([source])
    for name, digest in (("same", file.sha256), ("fp8 of it", "00" * 32)):
        weights = model.weights()
        if name == "fp8 of it":
            weights = {k: w.to(torch.float8_e4m3fn).float() for k, w in weights.items()}
        options = QuantOptions(calibration=calibrated(weights, digest))
        quantize_checkpoint(source, "Q8_0", tmp_path / f"{name}.gguf", options=options)


@pytest.mark.parametrize("level", ["INT8 W8A8", "W4A8", "INT4 W4A4", "Q8_0"])
def test_a_calibration_of_another_training_is_refused(tmp_path, source, level):
    options = QuantOptions(calibration=calibrated(model.weights(seed=5), "00" * 32))
    out = tmp_path / ("q.gguf" if level == "Q8_0" else "q.safetensors")
    (file,) = hash_files([source])
    with pytest.raises(CalibrationError, match="another model") as caught:
        quantize_checkpoint(source, level, out, options=options)
    assert "00" * 32 in str(caught.value)
    assert file.sha256 in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.fill_(torch.nan), "blocks contradict|NaN or infinity"),
        (lambda b: b[0, 0].__setitem__(1, torch.nan), "blocks hold NaN or infinity"),
        (lambda b: b[0, 0].__setitem__(1, -torch.inf), "blocks hold NaN or infinity"),
        (lambda b: b[1].fill_diagonal_(7), "blocks contradict square_sum"),
        (lambda b: b.set_(b[:1].clone()), "blocks do not fit"),
        (lambda b: b.set_(b[..., :9].clone()), "blocks do not fit"),
    ],
)
def test_damaged_moments_are_refused_and_nothing_is_written(
    tmp_path, source, capsys, change, message
):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    known = LayerStats.of(x, torch.ones(6, 16))
    blocks = block_sums(x, 10)
    good = tmp_path / "good.safetensors"
    Calibration({f"conditional.{W2}": replace(known, blocks=blocks)}, (0.5,)).save(good)
    assert Calibration.load(good).layer("conditional", W2).moments.blocks.shape == (2, 10, 10)
    change(blocks)
    bad = damage(good, tmp_path / "bad.safetensors", {"blocks": blocks.contiguous()})
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(bad)
    out = tmp_path / "q.safetensors"
    arguments = ["quantize", str(source), "--level", "W4A8", "--calibration", str(bad)]
    assert main([*arguments, "--out", str(out)]) != 0
    assert "bad.safetensors" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("asked", [["--level", "W4A8"], ["--target-gb", "0.003"]])
def test_moments_that_no_inputs_have_are_an_error_that_names_file_and_linear(
    tmp_path, capsys, asked
):
    """Each pair of inputs ten times as loud together as their own loudness allows."""
    source = model.write(tmp_path / "s.safetensors", model.weights())
    weight = model.weights()[f"{W2}.weight"]
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0))
    (file,) = hash_files([source])
    known = LayerStats.of(x, weight).spread_over(torch.tensor([1]), 2)
    blocks = -10 * torch.outer(*[known.square_sum.sqrt().float()] * 2)
    blocks.diagonal().copy_(known.square_sum)
    layers = {f"conditional.{W2}": replace(known, blocks=blocks[None])}
    bad, out = tmp_path / "bad.safetensors", tmp_path / "q.safetensors"
    runs = (run(models={"conditional": file.sha256}),)
    Calibration(layers, (0.2, 0.5), runs).save(bad)
    words = ["quantize", source, *asked, "--calibration", bad, "--out", out]
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert f"bad.safetensors: tensor conditional.{W2}: no inputs have such" in said
    assert "calibrate again" in said
    assert not out.exists()


def test_linears_that_a_calibration_does_not_know_are_named(tmp_path, source, caplog):
    """All others are better for it, and nobody would look for the difference."""
    (file,) = hash_files([source])
    whole = calibrated(model.weights(), file.sha256)
    part = replace(whole, layers={k: s for k, s in whole.layers.items() if not k.endswith(W2)})
    assert len(part.layers) == len(whole.layers) - 1
    for name, known in (("whole", whole), ("part", part)):
        caplog.clear()
        options = QuantOptions(calibration=known)
        report = quantize_checkpoint(source, "Q8_0", tmp_path / f"{name}.gguf", options=options)
        said = [note for note in report.notes if "knows nothing of 1 of" in note]
        assert len(said) == (name == "part")
        assert all(f"conditional.{W2} is one" in note and note in caplog.messages for note in said)


def test_a_calibration_of_another_size_or_copy_is_refused(tmp_path, source):
    known = calibrated(model.weights(), "00")
    odd = {**known.layers, f"conditional.{W2}": stats()[0]}
    for layers, message in (
        (odd, r"found \[6, 16\], needed \[256, 768\]"),
        ({f"un{key}": s for key, s in known.layers.items()}, "no statistics of the conditional"),
        ({"conditional.layers.7.attention.o": stats()[0]}, "no such linear"),
    ):
        options = QuantOptions(calibration=replace(known, layers=layers))
        with pytest.raises(CalibrationError, match=message):
            quantize_checkpoint(source, "INT8 W8A8", tmp_path / "q.safetensors", options=options)


def test_the_file_says_what_it_is(tmp_path):
    path = tmp_path / "c.safetensors"
    calibration().save(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "ideogram4-quant calibration"
        assert json.loads(file.metadata()["provenance"])[0]["models"] == {"conditional": "aa"}


def test_a_gguf_file_is_no_broken_download(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with pytest.raises(CheckpointError, match="a GGUF file") as caught:
        Calibration.load(tmp_path / "c.safetensors")
    assert "damaged" not in str(caught.value)
