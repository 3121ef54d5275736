"""Treatments and protection by calibration: what is chosen, what is stored, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.errors import CorruptFileError
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.ops.reference import smooth_rotate_quantize_rows
from ideogram4_quant.quant import (
    Calibration,
    LayerStats,
    QuantOptionError,
    QuantOptions,
    Run,
    inspect_file,
    plan_quantization,
    quantize_checkpoint,
)
from ideogram4_quant.quant.provenance import hash_files
from ideogram4_quant.quant.treatments import Treatment, int8_treatments, smoothing
from ideogram4_quant.tests import quant_model as model

W2, QKV, W1, W3 = (
    "layers.0.feed_forward.w2",
    "layers.0.attention.qkv",
    "layers.0.feed_forward.w1",
    "layers.0.feed_forward.w3",
)
ROTATED, BOTH = "int8 rotated", "int8 smooth 0.5 rotated"
USUAL = {"int8": 0.04, "int8 smooth 0.5": 0.03, "int8 smooth 0.8": 0.035, ROTATED: 0.02,
         BOTH: 0.0195, "int8 smooth 0.8 rotated": 0.03, "Q4_K": 0.001}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    """Random weights; the inputs of w2 in layer 0 have loud channels and the weight silent ones."""
    made = model.weights()
    made[f"{W2}.weight"][:, 5:9] /= 64
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    return model.write(tmp_path_factory.mktemp("source") / "s.safetensors", weights)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 768, generator=generator)
    x[:, 5:9] *= 64
    return x


@pytest.fixture(scope="module")
def calibration(source, weights, inputs):
    """Errors as USUAL for every block linear, but where a test needs others."""
    special = {
        W2: {**USUAL, "int8": 0.5, ROTATED: 0.3, "int8 smooth 0.5": 0.012, BOTH: 0.01},
        W1: {**USUAL, BOTH: 0.001},
        W3: {**USUAL, BOTH: 0.03, ROTATED: 0.05},
        QKV: {**USUAL, ROTATED: 0.06, BOTH: 0.05, "int8": 0.025},
        "layers.1.attention.qkv": {**USUAL, BOTH: 0.013},
        "layers.1.feed_forward.w2": {**USUAL, BOTH: 0.0124},
    }
    layers = {}
    for name in model.linear_names():
        weight = weights[f"{name}.weight"]
        x = inputs if weight.shape[1] == 768 else inputs[:, 10 : 10 + weight.shape[1]]
        errors = special.get(name, USUAL)
        layers[f"conditional.{name}"] = replace(
            LayerStats.of(x, weight),
            signal=torch.tensor([1.0]).double(),
            noise={c: torch.tensor([e * e]).double() for c, e in errors.items()},
        )
    (file,) = hash_files([source])
    run = Run({"conditional": file.sha256}, "", 1, (0,), 1, 128, 64)
    return Calibration(layers, (0.5,), (run,))


@pytest.fixture
def plan(source, calibration, tmp_path):
    """choices(level, **options) -> module -> Choice, for the block linears."""

    def choices(level="INT8 W8A8 rotated", **options):
        given = {"calibration": calibration, **options}
        made = plan_quantization(
            source, level, tmp_path / "q.safetensors", options=QuantOptions(**given)
        )
        return {t.module: t.choice for t in made.tensors if t.choice is not None}

    return choices


def names(choices):
    return {m: "bf16" if c.treatment is None else c.treatment.name for m, c in choices.items()}


def test_names_of_treatments_are_read_back():
    for treatment in int8_treatments((0.35, 0.5, 1.0)):
        assert Treatment.parse(treatment.name) == treatment
    for other in ("Q4_K", "int8 smooth", "int8 smooth 0.5 turned", "int9"):
        assert Treatment.parse(other) is None


def test_auto_takes_the_least_error_and_smoothing_only_for_a_gain(plan):
    found = names(plan(treatment="auto"))
    assert found[W2] == BOTH
    assert found[QKV] == "int8"
    assert found["layers.1.attention.o"] == ROTATED  # smoothing would gain 0.2 dB
    assert found["layers.1.attention.qkv"] == ROTATED  # 3.7 dB: too little
    assert found["layers.1.feed_forward.w2"] == BOTH  # 4.2 dB
    assert found[W1] == found[W3] == BOTH  # one input, one treatment
    choices = plan(treatment="auto")
    assert choices["layers.1.attention.qkv"].reason == (
        f"{ROTATED}: 34.0 dB, smoothing gains the linears of this input less than 4 dB; "
        f"{BOTH} 37.7 dB"
    )
    assert torch.equal(choices[W1].smooth, choices[W3].smooth)
    assert choices["layers.1.attention.o"].smooth is None
    assert choices[W2].reason == f"{BOTH}: 40.0 dB, the best of 6; int8 smooth 0.5 38.4 dB"


def test_auto_native_takes_what_comfyui_can_say(plan):
    found = plan(treatment="auto-native")
    assert set(names(found).values()) == {"int8", ROTATED}
    assert names(found)[QKV] == "int8"
    assert names(found)[W2] == ROTATED


@pytest.fixture
def loud_inputs(calibration):
    """The same, with what rounded inputs alone leave of w2 (36.5 and 40.9 dB), w1 and w3."""
    alone = {W2: 0.015, "layers.1.feed_forward.w2": 0.009, W1: 0.001, W3: 0.015, QKV: 0.02}
    layers = {}
    for key, stats in calibration.layers.items():
        error = alone.get(key.removeprefix("conditional."), 0.001)
        square = torch.tensor([error * error]).double()
        layers[key] = replace(stats, noise={**stats.noise, "int8 rotated inputs": square})
    return replace(calibration, layers=layers)


def test_auto_native_multiplies_in_16_bits_what_rounded_inputs_would_hurt(plan, loud_inputs):
    found = plan(treatment="auto-native", calibration=loud_inputs)
    dense = {module for module, choice in found.items() if choice.dense}
    assert dense == {W2, W1, W3}  # w1 has w3's input; qkv is not rotated
    assert found[W2].reason.endswith("; in 16 bits, as rounded activations alone leave 36.5 dB")
    assert names(found) == names(plan(treatment="auto-native"))
    for other in ({"treatment": "auto"}, {"protect_below": 15.0}, {}):
        assert not any(c.dense for c in plan(calibration=loud_inputs, **other).values())


def test_a_file_asks_for_16_bit_products_as_stock_reads_it(source, loud_inputs, tmp_path):
    out = tmp_path / "q.safetensors"
    options = QuantOptions(calibration=loud_inputs, treatment="auto-native")
    report = quantize_checkpoint(source, "INT8 W8A8 rotated", out, options=options)
    assert any("3 linears are multiplied in 16 bits" in note for note in report.notes)
    stored = load_file(out)
    said = json.loads(stored[f"{W2}.comfy_quant"].numpy().tobytes())
    assert said == {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": 256,
        "full_precision_matrix_mult": True,
    }
    other = stored["layers.1.attention.o.comfy_quant"].numpy().tobytes()
    assert b"full_precision" not in other
    seen = inspect_file(out)
    assert [kind.dense for kind in seen.storage if kind.level == "INT8 W8A8 rotated"] == [3]
    assert "3 of them multiplied in 16 bits" in seen.table()
    weight = open_checkpoint(out).load("conditional")[f"{W2}.weight"].to(dtype=torch.float32)
    assert weight._params.label == "INT8 rot256 16-bit"
    x = torch.randn(7, 768, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.dequantize().T
    assert torch.allclose(linear(x, weight), exact, rtol=1e-5, atol=1e-5)
    rounded = linear(x, weight, None, LinearOptions(int8_compute="w8a8"))
    assert (rounded - exact).norm() > 1e-3 * exact.norm()


def test_smooth_keeps_the_level_and_searches_alpha(plan, calibration):
    assert names(plan("INT8 W8A8", treatment="smooth"))[W2] == "int8 smooth 0.5"
    assert names(plan(treatment="smooth"))[QKV] == "int8 smooth 0.8 rotated"
    fixed = plan(alpha=0.6)
    assert set(names(fixed).values()) == {"int8 smooth 0.6 rotated"}
    stats = calibration.layer("conditional", W2)
    assert torch.equal(fixed[W2].smooth, smoothing([stats], 0.6))
    assert "not measured" in fixed[W2].reason


def test_without_a_treatment_nothing_changes_but_protection(plan):
    found = names(plan(protect_below=15.0))
    assert {m for m, name in found.items() if name == "bf16"} == {W2}
    assert set(found.values()) == {"bf16", ROTATED}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"protect_share": 1 / 12}, {W2}),
        ({"protect_share": 0.16}, {W2, QKV}),
        ({"protect_share": 0.0}, set()),
        ({"protect_below": 24.5}, {W2, QKV}),
        ({"protect_bytes": 256 * 768}, {W2}),
        ({"protect_bytes": 256 * 768 - 1}, {"layers.0.attention.o", "layers.1.attention.o"}),
        ({"protect_bytes": 0}, set()),
        ({"protect": (W2,), "protect_share": 1 / 11}, {QKV}),
    ],
)
def test_protection_takes_the_most_fragile(plan, options, kept):
    found = plan(**options)
    bf16 = {m for m, c in found.items() if c.treatment is None}
    assert bf16 == kept
    assert all(found[m].reason.startswith("bf16: ") for m in bf16)


def test_what_is_protected_is_what_stays_fragile_after_treatment(plan):
    found = names(plan(treatment="auto", protect_share=1 / 12))
    assert found[W2] == BOTH
    assert found[W3] == "bf16"
    assert found[W1] == BOTH


def test_linears_without_statistics_get_the_usual(plan, calibration):
    layers = {k: s for k, s in calibration.layers.items() if W3 not in k}
    found = plan(treatment="auto", calibration=replace(calibration, layers=layers))
    assert names(found)[W1] == names(found)[W3] == ROTATED
    assert "not calibrated" in found[W1].reason


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("INT8 W8A8", {"treatment": "auto", "calibration": None}, "needs a calibration"),
        ("INT8 W8A8", {"protect_below": 20.0, "calibration": None}, "needs a calibration"),
        ("Q8_0", {"treatment": "auto"}, "for INT8 levels"),
        ("INT8 W8A8", {"treatment": "best"}, "unknown treatment"),
        ("INT8 W8A8", {"treatment": "auto", "alpha": 0.5}, "goes with the treatment smooth"),
        ("INT8 W8A8", {"alpha": 1.5}, "out of range"),
        ("INT8 W8A8", {"protect_share": 8.0}, "out of range"),
        ("INT8 W8A8", {"protect_bytes": -1}, "out of range"),
        ("INT8 W8A8", {"alpha": 0.6, "protect_share": 0.1}, "int8 smooth 0.6"),
        ("INT8 W8A8", {"treatment": "auto", "smooth": {W2: torch.ones(768)}}, "given already"),
    ],
)
def test_options_that_cannot_be(source, tmp_path, calibration, level, options, message):
    out = tmp_path / ("q.gguf" if level == "Q8_0" else "q.safetensors")
    given = QuantOptions(**{"calibration": calibration, **options})
    with pytest.raises(QuantOptionError, match=message):
        plan_quantization(source, level, out, options=given)


# ---- files


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory, source, calibration):
    path = tmp_path_factory.mktemp("smoothed") / "q.safetensors"
    options = QuantOptions(calibration=calibration, treatment="auto", protect_share=1 / 12)
    return path, quantize_checkpoint(source, "INT8 W8A8 rotated", path, options=options)


def test_stored_parts_are_the_formula(smoothed, weights, calibration):
    stored = load_file(smoothed[0])
    vector = smoothing([calibration.layer("conditional", W2)], 0.5)
    q, scale = smooth_rotate_quantize_rows(weights[f"{W2}.weight"].float() * vector, None, 256)
    assert torch.equal(stored[f"{W2}.weight"], q)
    assert torch.equal(stored[f"{W2}.weight_scale"][:, 0], scale)
    assert torch.equal(stored[f"{W2}.smooth"], vector)
    conf = json.loads(bytes(stored[f"{W2}.comfy_quant"].tolist()))
    assert conf == {
        "format": "ideogram4_quant_int8", "convrot": True, "convrot_groupsize": 256,
    }  # fmt: skip
    native = json.loads(bytes(stored[f"{QKV}.comfy_quant"].tolist()))
    assert native == {"format": "int8_tensorwise"}
    assert f"{QKV}.smooth" not in stored
    assert stored[f"{W3}.weight"].dtype == torch.bfloat16


def test_our_reader_computes_with_the_vector(smoothed, weights, inputs):
    path, report = smoothed
    loaded = open_checkpoint(path).load("conditional", dtype=torch.float32)
    weight = loaded[f"{W2}.weight"]
    assert isinstance(weight, QuantizedTensor)
    wanted = inputs @ weights[f"{W2}.weight"].float().T
    error = ((linear(inputs, weight) - wanted).norm() / wanted.norm()).item()
    assert error < 0.015
    figure = next(t for t in report.tensors if t.name == f"{W2}.weight")
    true = weights[f"{W2}.weight"].float()
    noise = (weight.dequantize() - true).norm() / true.norm()
    assert -20 * noise.log10().item() == pytest.approx(figure.sqnr_db, abs=0.01)
    assert figure.type == "INT8 smooth rot256"


def test_the_file_says_what_each_linear_got_and_why(smoothed, caplog):
    path, report = smoothed
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["quantization"])
    assert record["treatments"].keys() == set(model.linear_names())
    assert record["treatments"][W2].startswith(f"{BOTH}: 40.0 dB")
    assert record["treatments"][W3].startswith("bf16: among the 1 most fragile of 12")
    assert record["protected"] == [W3]
    assert W2 in record["smoothed"]
    assert QKV not in record["smoothed"]
    assert any(W3 in note and "bf16" in note for note in report.notes)
    assert any("stock ComfyUI refuses" in note for note in report.notes)


def test_a_smoothed_weight_without_its_vector_is_refused(smoothed, tmp_path):
    stored = load_file(smoothed[0])
    del stored[f"{W2}.smooth"]
    with safe_open(smoothed[0], "pt") as file:
        metadata = file.metadata()
    save_file(stored, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(CorruptFileError, match="without its vector"):
        open_checkpoint(tmp_path / "cut.safetensors").load("conditional")


def test_given_vectors_go_into_the_native_container_too(source, tmp_path, inputs, weights):
    vector = torch.linspace(0.5, 2, 768)
    path = tmp_path / "q.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", path, options=QuantOptions(smooth={W2: vector}))
    weight = open_checkpoint(path).load("conditional", dtype=torch.float32)[f"{W2}.weight"]
    assert torch.equal(weight._params.smooth, vector)
    true = weights[f"{W2}.weight"].float()
    assert (weight.dequantize() - true).norm() < 0.05 * true.norm()


def test_transformer_labs_container_gets_smoothing_alone(source, tmp_path, calibration):
    options = QuantOptions(
        container="transformer-lab", calibration=calibration, treatment="auto", linears="blocks"
    )
    path = tmp_path / "lab.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", path, copy="conditional", options=options)
    stored = load_file(path)
    assert f"conditional.{W2}.smooth" in stored
    assert f"conditional.{QKV}.smooth" not in stored


def test_the_command_takes_a_calibration(source, tmp_path, calibration, capsys, smoothed):
    cal, out = tmp_path / "c.safetensors", tmp_path / "q.safetensors"
    calibration.save(cal)
    command = ["quantize", str(source), "--level", "INT8 W8A8 rotated", "--out", str(out)]
    more = ["--calibration", str(cal), "--treatment", "auto", "--protect-budget", "9%"]
    assert main([*command, *more]) == 0
    assert "INT8 smooth rot256" in capsys.readouterr().out
    wanted, found = load_file(smoothed[0]), load_file(out)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert main([*command, "--overwrite", *more[:2], "--protect-budget", "200kB", "--dry-run"]) == 0
    assert W2 in capsys.readouterr().out
    assert main([*command, "--overwrite", *more[:2], "--protect-budget", "a lot"]) == 1
    assert "8% or 700MB" in capsys.readouterr().err
