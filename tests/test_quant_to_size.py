"""A size instead of a level, by command: what is written, gone on with, and refused."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.quant import Calibration, QuantOptions
from ideogram4_quant.quant.errors import QuantOptionError
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.quant.sensitivity import Part, Sensitivity, Sums
from ideogram4_quant.tests import quant_model as model

COPIES = ("conditional", "unconditional")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return [
        model.write(folder / f"{copy}.safetensors", model.weights(seed), copy)
        for seed, copy in enumerate(COPIES)
    ]


def run(capsys, *words):
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_pair_fills_its_size_with_a_file_a_copy(tmp_path, sources, capsys, suffix):
    out, other = tmp_path / f"m.{suffix}", tmp_path / f"unconditional-0.0065GB.{suffix}"
    words = ["quantize", sources[0], "--pair", sources[1], "--out", out, "--target-gb", 0.0065]
    code, text, _ = run(capsys, *words, "--dry-run")
    assert code == 0
    assert not out.exists()
    assert "would write" in text
    code, text, errors = run(capsys, *words)
    assert code == 0, errors
    size = out.stat().st_size + other.stat().st_size
    assert 6.5e6 * 0.95 < size <= 6.5e6
    assert "foretold: final latents" in text
    assert "sensitivities are built in" in text
    bits = []
    for copy, path in zip(COPIES, (out, other), strict=True):
        found = open_checkpoint(path)
        assert found.copies == (copy,)
        assert set(found.shapes(copy)) == set(model.shapes())
        bits.append(path.stat().st_size)
    assert bits[0] > bits[1]  # what the picture feels more gets more


@pytest.mark.parametrize(("gb", "taken"), [(0.0048, False), (0.0046, True)])
def test_four_bit_inputs_are_taken_unmeasured_only_where_nothing_else_is_so_small(
    tmp_path, sources, capsys, gb, taken
):
    out = tmp_path / "m.safetensors"
    words = ["quantize", sources[0], "--pair", sources[1], "--out", out, "--target-gb", gb]
    code, text, errors = run(capsys, *words, "--dry-run")
    assert code == 0, errors
    assert ("W4A4" in text) == taken


def test_a_finished_copy_stays_when_the_run_goes_on(tmp_path, sources, capsys):
    out, other = tmp_path / "m.gguf", tmp_path / "unconditional-0.0065GB.gguf"
    words = ["quantize", sources[0], "--pair", sources[1], "--out", out, "--target-gb", 0.0065]
    assert run(capsys, *words)[0] == 0
    first, second = out.read_bytes(), other.read_bytes()
    other.unlink()
    assert run(capsys, *words)[0] == 1
    assert run(capsys, *words, "--resume")[0] == 0
    assert (out.read_bytes(), other.read_bytes()) == (first, second)
    other.unlink()
    words[-1] = 0.007
    code, _, errors = run(capsys, *words, "--resume")
    assert code == 1
    assert "not of this choice" in errors
    assert not other.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_finished_file_of_another_source_is_refused_though_as_much_is_foretold(
    tmp_path, capsys, suffix
):
    """A norm is of no linear: what is foretold does not tell the two sources apart."""
    weights = model.weights()
    source = model.write(tmp_path / "source.safetensors", weights)
    words = ["quantize", source, "--out", tmp_path / f"m.{suffix}", "--target-gb", 0.0042]
    assert run(capsys, *words)[0] == 0
    before = words[3].read_bytes()
    code, _, errors = run(capsys, *words, "--resume")
    assert code == 0, errors
    name = next(name for name in weights if name.endswith("attention_norm1.weight"))
    model.write(source, weights | {name: weights[name] * 1.5})
    code, _, errors = run(capsys, *words, "--resume")
    assert code == 1
    assert "its source is another" in errors
    assert "--overwrite" in errors
    assert words[3].read_bytes() == before


def test_a_finished_file_of_other_storages_is_refused_though_as_much_is_foretold(
    tmp_path, sources, capsys
):
    out = tmp_path / "m.safetensors"
    words = ["quantize", sources[0], "--out", out, "--target-gb", 0.0042]
    assert run(capsys, *words)[0] == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out)
    record = json.loads(metadata["quantization"])
    kinds = list(record["storage"])
    record["storage"][kinds[0]].append(record["storage"][kinds[1]].pop())
    save_file(tensors, out, metadata | {"quantization": json.dumps(record, separators=(",", ":"))})
    code, _, errors = run(capsys, *words, "--resume")
    assert code == 1
    assert "its storage is another" in errors


def test_one_copy_has_the_size_for_itself_and_says_what_was_chosen(tmp_path, sources, capsys):
    out = tmp_path / "m.safetensors"
    code, _, _ = run(capsys, "quantize", sources[0], "--out", out, "--target-gb", 0.0042)
    assert code == 0
    assert out.stat().st_size <= 4.2e6
    with safe_open(out, "pt") as file:
        record = json.loads(file.metadata()["quantization"])
    assert record["prediction"]["target"] == "0.0042 GB"
    assert "W4A4: the least squared error of an output channel" in record["scale"]
    stored = [name for names in record["storage"].values() for name in names]
    assert set(stored) >= set(model.linear_names())
    assert len(stored) == len(set(stored))


@pytest.mark.parametrize(
    ("words", "built"),
    [
        (["--target-gb", 0.0042], 1),
        (["--target-gb", 0.0042, "--dry-run"], 1),  # rows are encoded to choose
        (["--level", "Q8_0"], 1),
        (["--level", "Q8_0", "--dry-run"], 0),
    ],
)
def test_whatever_encodes_has_the_compiled_encoder(tmp_path, sources, capsys, monkeypatch,
                                                   words, built):  # fmt: skip
    calls = []
    monkeypatch.setattr("ideogram4_quant.quant.compiled.prepare", lambda: calls.append(1))
    code, _, errors = run(capsys, "quantize", sources[0], "--out", tmp_path / "m.gguf", *words)
    assert code == 0, errors
    assert len(calls) == built


def test_a_long_licence_is_counted(tmp_path, sources, capsys):
    """What is asked for is the size of the whole file, whatever its source's metadata hold."""
    out = tmp_path / "m.safetensors"
    words = ["quantize", sources[0], "--out", out, "--licence", "\u00a7" * 30_000]
    code, _, errors = run(capsys, *words, "--target-gb", 0.001)
    assert code == 1
    least = int(re.search(r"\(([\d,]+) bytes\)", errors)[1].replace(",", ""))
    code, _, errors = run(capsys, *words, "--target-gb", least / 1e9)
    assert code == 0, errors
    assert out.stat().st_size <= least


def test_a_card_is_a_size_less_what_work_takes(tmp_path, sources, capsys):
    out = tmp_path / "m.gguf"
    words = ["quantize", sources[0], "--out", out, "--fit", "1.9035GB", "--dry-run"]
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert "a card of 1.9035GB: 3.5" in text or "a card of 1.9035GB: 3.4" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target-gb", 0.001], ["below the smallest", "needed at least 0.00"]),
        (["--fit", "2GB", "--target-gb", 1], []),
        (["--fit", "all"], ["as 24GB"]),
        (["--fit", "1GB"], ["found 1GB", "more than the 1.9 GB"]),
        (["--target-gb", -1], ["above 0"]),
        (["--target-gb", "nan"], ["above 0"]),
        (["--target-gb", 1], ["everything fits unquantized", "source as it is"]),
        (["--fit", "24GB"], ["everything fits unquantized", "a card of 24GB", "22.1 GB is more"]),
        (["--target-seconds", 99, "--card", "RTX 3090"], ["everything fits unquantized"]),
        (["--target-gb", 1, "--level", "Q4_K"], ["Leave --level out"]),
        (["--native", "--level", "Q4_K"], ["goes with a size"]),
        (["--target-gb", 1, "--native", "--out", "x.gguf"], ["cannot hold", ".safetensors"]),
        (["--target-gb", 1, "--container", "transformer-lab"], ["ComfyUI's own container"]),
        (["--target-gb", 1, "--out", "x.bin"], [".safetensors or .gguf"]),
        (["--target-gb", 1, "--type", "*=Q4_K"], ["chooses by itself"]),
        (["--target-seconds", 1], ["card that is modelled", "RTX 3090"]),
        (["--target-seconds", 1, "--card", "RTX 1"], ["RTX 1", "RTX 3090"]),
        (["--target-seconds", 0.001, "--card", "RTX 3090"], ["at least", "modelled"]),
        (["--card", "RTX 3090", "--target-gb", 1], ["goes with --target-seconds"]),
        ([], ["--level L, or a size"]),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(tmp_path, sources, capsys, words, said):
    start = ["quantize", sources[0]]
    if "--out" not in words:
        start += ["--out", tmp_path / "m.safetensors"]
    words = [str(tmp_path / w) if str(w).startswith("x.") else w for w in words]
    if not said:
        with pytest.raises(SystemExit):
            run(capsys, *start, *words)
    else:
        code, _, errors = run(capsys, *start, *words)
        assert code == 1
        assert all(part in errors for part in said), errors
    assert list(Path(tmp_path).iterdir()) == []


def test_a_calibration_of_another_model_is_refused(tmp_path, sources, capsys):
    x = torch.randn(600, 64)
    layers = {"conditional.layers.0.attention.qkv": LayerStats.of(x, torch.randn(8, 64))}
    calibration = tmp_path / "cal.safetensors"
    Calibration(layers, (0.5,)).save(calibration)
    out = tmp_path / "m.gguf"
    words = ["quantize", sources[0], "--out", out, "--target-gb", 0.0035, "--calibration"]
    words.append(calibration)
    code, _, errors = run(capsys, *words)
    assert code == 1
    assert "calibration of another model" in errors
    assert not out.exists()


def test_sensitivities_come_back_and_lead_the_choice(tmp_path, sources, capsys):
    from ideogram4_quant.quant.provenance import combined_hash, hash_files

    digest = combined_hash(hash_files([sources[0]]))
    dear = "layers.0.attention.qkv"
    linears = {
        f"conditional.{name}": Sums(2, 1.0, Part(math.log(1e4 if name == dear else 1e-8), 1.0))
        for name in model.linear_names()
    }
    path = tmp_path / "sens.json"
    Sensitivity(linears, {"conditional": digest}, {"a": 1}, ("0", "1")).save(path)
    found = Sensitivity.load(path)
    assert found.linears == linears
    assert found.gain("conditional", dear) == pytest.approx((100.0, 0, 0))
    out = tmp_path / "m.gguf"
    words = ["quantize", sources[0], "--out", out, "--target-gb", 0.0035, "--sensitivity", path]
    code, text, errors = run(capsys, *words)
    assert code == 0, errors
    assert "built in" not in text
    types = {k: e.level for k, e in open_checkpoint(out).entries["conditional"].items()}
    assert types[f"{dear}.weight"] == "BF16"
    other = [*words[:1], sources[1], *words[2:]]
    code, _, errors = run(capsys, *other, "--overwrite")
    assert code == 1
    assert "sensitivities of another model" in errors


def test_a_mixed_level_needs_a_choice(tmp_path, sources):
    from ideogram4_quant.quant import plan_quantization

    with pytest.raises(QuantOptionError, match="target"):
        plan_quantization(sources[0], "mixed", tmp_path / "m.safetensors", options=QuantOptions())
