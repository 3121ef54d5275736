"""The table of systems on the pocket model: what a row computes, and that it is made once."""

import csv
import re
from dataclasses import replace

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreConvRotW4A4Layout
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.compare.metrics import psnr
from ideogram4_quant.engine.generate import GenerateRequest, generate
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path
from ideogram4_quant.pocket.table import __main__ as table
from ideogram4_quant.pocket.table import systems
from ideogram4_quant.pocket.table.models import VARIANTS, write_model
from ideogram4_quant.pocket.table.painting import Studio, cases_of_part
from ideogram4_quant.pocket.table.runs import RunStore, run_key
from ideogram4_quant.quant import RECIPES, QuantOptions, Run, quantize_checkpoint
from ideogram4_quant.quant.calibration import Calibration
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.quant.provenance import hash_files
from ideogram4_quant.tests.tensors import relative

NAME = "layers.1.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def state():
    return load_file(dit_path("cond"))


def stats(inputs, weight) -> LayerStats:
    """Statistics of a linear whose output error in naive W8A8 grows with its outlier."""
    found = LayerStats.of(inputs, weight)
    noise = inputs.abs().amax().double().reshape(1)
    return replace(found, signal=torch.ones(1, dtype=torch.float64), noise={"int8": noise})


@pytest.fixture(scope="module")
def calibration(state) -> Calibration:
    """Of two layers' w1, w3, w2 and the stem, with outliers in w2's input."""
    layers = {}
    generator = torch.Generator().manual_seed(0)
    for name in ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3", "layers.0.feed_forward.w2",
                 "layers.1.feed_forward.w2", "input_proj"):  # fmt: skip
        weight = state[f"{name}.weight"].float()
        x = torch.randn(64, weight.shape[1], generator=generator)
        x[:, 5] *= {"layers.0.feed_forward.w2": 40, "layers.1.feed_forward.w2": 90}.get(name, 1)
        x *= 500 if name == "input_proj" else 1
        layers[f"conditional.{name}"] = stats(x, weight)
    return Calibration(layers, (0.0,))


@pytest.mark.parametrize(
    "scheme",
    [s for s in systems.SCHEMES if s.level is None and s.peer is None and s.compute != "w4a4"],
    ids=lambda s: s.name,
)
def test_unpacked_weights_multiply_as_the_packed_ones(state, calibration, scheme):
    """What a row computes with is what `ops.linear` makes of the stored weight at each call."""
    packed = systems.weights(scheme, {NAME: state[NAME]}, "conditional", calibration)
    ready = systems.unpacked(packed, scheme.compute)[NAME]
    x = torch.randn(96, 768, generator=torch.Generator().manual_seed(0))
    values = scheme.compute == systems.IN_16_BITS
    options = (
        LinearOptions(int8_compute="dense")
        if values
        else LinearOptions(gguf_compute=scheme.compute)
    )
    assert torch.equal(linear(x, ready, None, options), linear(x, packed[NAME], None, options))


def test_stocks_int4_rounds_activations_to_four_bits(state):
    (scheme,) = [s for s in systems.SCHEMES if s.name == "INT4 W4A4 (comfy-kitchen)"]
    packed = systems.weights(scheme, {NAME: state[NAME]})
    x = torch.randn(96, 768, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, 256)
    step = turned.abs().amax(1, keepdim=True) / 7
    rounded = rotate((turned / step).round() * step, 256)
    want = rounded @ packed[NAME].dequantize().T
    assert relative(linear(x, systems.unpacked(packed, "w4a4")[NAME]), want) < 1e-5
    assert relative(linear(x, packed[NAME]), want) > 0.1


def test_the_int4_row_of_comfy_kitchen_has_comfy_kitchens_own_scales(state):
    """This pack's layout tries nearer ones: they are not what others' files hold."""
    weight = state[NAME].float()
    scheme = next(s for s in systems.SCHEMES if s.name == "INT4 W4A4 (comfy-kitchen)")
    made = scheme.store(weight, None)
    codes, params = TensorCoreConvRotW4A4Layout.quantize(weight)
    assert torch.equal(made._params.scale, params.scale)
    assert torch.equal(made._qdata, codes)


@pytest.mark.parametrize(
    ("name", "level"),
    [("ours: INT8 rotated, calibrated", "INT8 W8A8 rotated"), ("ours: Q4_K, calibrated", "Q4_K")],
)
def test_calibrated_rows_are_what_the_quantizer_writes(tmp_path, state, calibration, name, level):
    source = write_model(VARIANTS[0], tmp_path)["conditional"]
    (file,) = hash_files([source])
    run = Run({"conditional": file.sha256}, "", 1, (0,), 20, 64, 64)
    out = tmp_path / f"q.{RECIPES[level].file_format}"
    options = QuantOptions(calibration=replace(calibration, times=(0.0, 0.5), provenance=(run,)))
    quantize_checkpoint(source, level, out, copy="conditional", options=options)
    files = open_checkpoint(out).load("conditional")
    (scheme,) = [s for s in systems.SCHEMES if s.name == name]
    known = {k: state[k] for k in (NAME, "layers.0.feed_forward.w1.weight")}
    row = systems.weights(scheme, known, "conditional", calibration)
    for tensor in known:
        assert torch.equal(row[tensor]._qdata, files[tensor]._qdata)
        assert torch.equal(row[tensor].dequantize().bfloat16(), files[tensor].dequantize())


def test_the_most_fragile_block_linears_stay_in_bf16(state, calibration):
    assert systems.fragile(calibration, "conditional")[:2] == [
        "layers.1.feed_forward.w2",
        "layers.0.feed_forward.w2",
    ]
    (scheme,) = [s for s in systems.SCHEMES if s.name == "W8A8, 1 protected"]
    some = {k: state[k] for k in (NAME, "layers.0.feed_forward.w2.weight", "input_proj.weight")}
    kept = systems.weights(scheme, some, "conditional", calibration)
    assert [name for name in some if kept[name] is some[name]] == [NAME, "input_proj.weight"]


def test_smoothing_moves_the_outlier_into_the_weight_and_w1_and_w3_share_it(state, calibration):
    (scheme,) = [s for s in systems.SCHEMES if s.name == "W8A8 + smooth"]
    names = [f"layers.0.feed_forward.w{i}.weight" for i in (1, 2, 3)]
    made = systems.weights(scheme, {n: state[n] for n in names}, "conditional", calibration)
    first, second, third = (made[name]._params.smooth for name in names)
    assert torch.equal(first, third)
    weight = state[names[1]].float()
    columns = weight.abs().amax(0)
    loud = calibration.layer("conditional", names[1][:-7]).absmax
    expected = (loud.clamp_min(loud.median()) / columns).sqrt()
    ratio = second / expected
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
    assert torch.allclose(made[names[1]].dequantize(), weight, atol=weight.abs().max() / 50)


def test_batches_paint_what_the_engine_paints_one_by_one(pocket):
    studio = Studio()
    pair = open_pair(pocket.conditional_file, pocket.unconditional_file)
    models = load_pair(pair, None, studio.vae, device="cpu")
    cases = cases_of_part(2)[:3]
    painted = studio.paint(models, cases)
    request = GenerateRequest(cases[2].prompt, cases[2].width, cases[2].height, cases[2].seed)
    alone = generate(request, models, features=studio.features[cases[2].prompt])
    assert psnr(alone.image, painted.pictures[2]) > 60
    assert torch.allclose(alone.latents, painted.trajectories[2, -1], atol=1e-3)


def test_parts_hold_every_prompt_once_with_its_own_seed_first():
    cases = [case for part in range(4) for case in cases_of_part(part)]
    assert len({case.key for case in cases}) == 2 * len(HELD_OUT) == len(cases)
    assert [c.seed for c in cases[: len(HELD_OUT)]] == [p.seed for p in HELD_OUT]
    assert [c.text for c in cases[len(HELD_OUT) :]] == [p.word for p in HELD_OUT]


def test_a_run_is_made_once_and_again_for_other_weights(tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    two = cases_of_part(0)[:2]
    monkeypatch.setattr(table, "cases_of_part", lambda part: two)
    store = RunStore(tmp_path)
    chosen = [s for s in systems.SCHEMES if s.name in ("BF16", "NF4")]
    jobs = list(table.jobs_of(VARIANTS[:1], chosen, [0]))
    maker = table.Maker(store)
    for job in jobs:
        maker.make(job)
    reference, nf4 = store.newest().values()
    assert (reference.scheme, nf4.scheme) == ("BF16", "NF4")
    assert reference.steps == []
    assert len(nf4.steps) == 2
    assert len(nf4.steps[0]) == 20
    assert nf4.bytes < 0.4 * reference.bytes
    assert 10 < nf4.scores["psnr"][0] < 60
    assert set(reference.scores) == {"ocr_exact", "ocr_distance"}

    again = table.Maker(RunStore(tmp_path))
    for job in jobs:
        again.make(job)
    assert again.studio is None  # nothing was painted


def test_a_key_covers_weights_compute_cases_and_reference():
    tensors = {"conditional": {"a": torch.ones(2)}}
    other = {"conditional": {"a": torch.tensor([1.0, 2.0])}}
    cases = cases_of_part(0)
    keys = {
        run_key(tensors, "dense", cases, None),
        run_key(tensors, "w8a8", cases, None),
        run_key(tensors, "dense", cases[:1], None),
        run_key(tensors, "dense", cases, "another reference"),
        run_key(other, "dense", cases, None),
    }
    assert len(keys) == 5
    assert run_key(tensors, "dense", cases_of_part(0), None) in keys


def test_the_page_of_levels_prints_what_the_table_says():
    document = table.DOCUMENT.read_text(encoding="utf-8")
    page = (table.DOCUMENT.parent / "levels.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?:\*\*)?([^|*(]+?)(?:\*\*)?(?: \(.+?\))?" + r" \| ([\d.]+)" * 4 + r" \|$",
        page,
        re.M,
    )
    assert len(rows) == 10
    for name, *printed in rows:
        models = (
            document.partition(f"<!-- begin {m} -->")[2] for m in ("clean", "channels", "tokens")
        )
        cells = [re.search(rf"^\| {re.escape(name)} \|.*$", m, re.M)[0].split("|") for m in models]
        found = [float(cells[0][2]), *(float(row[5].split()[0]) for row in cells)]
        assert [float(value) for value in printed] == pytest.approx(found, abs=0.0501)


def test_the_figures_of_the_levels_are_those_of_their_table():
    text = table.DOCUMENT.read_text(encoding="utf-8").partition("<!-- begin levels -->")[2]
    rows = [line.split(" | ") for line in text.partition("<!-- end levels -->")[0].splitlines()[3:]]
    printed = {row[0].strip("| *"): row[1:] for row in rows}
    with table.DOCUMENT.with_name("pocket-levels.csv").open(encoding="utf-8") as file:
        figures = list(csv.DictReader(file))
    assert {row["level"] for row in figures} == set(printed)
    for row in figures:
        bits, _, pictures, *cells = printed[row["level"]]
        cell = cells[("clean", "channels", "tokens").index(row["model"])]
        assert row["prompts x seeds"] == pictures
        assert float(row["bits"]) == pytest.approx(float(bits), abs=0.0055)
        found = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
        wanted = [float(row[name]) for name in ("sqnr", "low", "high")]
        assert found == pytest.approx(wanted, abs=0.0501)


def test_a_model_has_the_same_bytes_whenever_it_is_written(tmp_path):
    """Its calibration is found again by the hash of its files."""
    written = [write_model(VARIANTS[0], tmp_path / str(i)) for i in range(4)]
    for copy in ("conditional", "unconditional"):
        assert len({files[copy].read_bytes() for files in written}) == 1


def test_stress_is_for_the_systems_that_ask_for_it():
    jobs = list(table.jobs_of(VARIANTS, systems.SCHEMES, range(2)))
    stressed = {job.scheme.name for job in jobs if job.variant.stress}
    assert stressed == {s.name for s in systems.SCHEMES if s.stress}
    assert all(job.scheme.name == systems.REFERENCE for job in jobs[: 2 * len(VARIANTS)])
    made = [(job.scheme.name, job.variant) for job in jobs[::2]]
    assert len(set(made)) == len(made)  # both parts of what is quantized once
