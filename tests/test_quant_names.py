"""Quantized files keep their source's name, in the command and for both copies."""

from __future__ import annotations

import math

import pytest

from ideogram4_quant.cli import main
from ideogram4_quant.files.new_file import OutputExistsError, check_output
from ideogram4_quant.nodes.switches import for_the_node, in_words_of_the_node
from ideogram4_quant.quant.errors import QuantOptionError
from ideogram4_quant.quant.output_names import output_name
from ideogram4_quant.quant.presets import PRESETS, preset_of
from ideogram4_quant.quant.recipes import QuantOptions, recipe_of
from ideogram4_quant.quant.tables import off_by
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests import quant_model as model


@pytest.mark.parametrize(
    ("source", "level", "copy", "name"),
    [
        ("my-tune-v2.safetensors", "Q4_K", None, "my-tune-v2-Q4_K.gguf"),
        ("a/b/my-tune-v2.sft", "INT8 W8A8", None, "my-tune-v2-INT8_W8A8.safetensors"),
        ("my-tune-v2-bf16.safetensors", "Q4_K", None, "my-tune-v2-Q4_K.gguf"),
        ("ideogram4_fp8_scaled.safetensors", "Q8_0", None, "ideogram4-Q8_0.gguf"),
        ("tune-00001-of-00004.safetensors", "Q4_K", None, "tune-Q4_K.gguf"),
        ("tune_Q8_0.gguf", "Q4_K", None, "tune-Q4_K.gguf"),
        ("bf16.safetensors", "Q4_K", None, "bf16-Q4_K.gguf"),
        ("my.tune.v2", "Q4_K", None, "my.tune.v2-Q4_K.gguf"),
        ("both.safetensors", "Q4_K", "unconditional", "both-unconditional-Q4_K.gguf"),
        ("x-unconditional.safetensors", "Q4_K", "unconditional", "x-unconditional-Q4_K.gguf"),
        (
            "x-unconditional.safetensors",
            "Q4_K",
            "conditional",
            "x-unconditional-conditional-Q4_K.gguf",
        ),
    ],
)
def test_names(source, level, copy, name):
    assert output_name(source, recipe_of(level), copy) == name


@pytest.fixture
def tune(tmp_path):
    """Two copies in files that say in their metadata which one they are."""
    made = []
    for copy, name in (("conditional", "my-tune-v2"), ("unconditional", "my-tune-v2-uncond")):
        path = tmp_path / f"{name}.safetensors"
        made.append(model.write(path, model.weights(), metadata={"ideogram4.copy": copy}))
    return made


def test_the_command_names_the_file_after_its_source(tune, capsys):
    assert main(["quantize", str(tune[0]), "--level", "q8_0"]) == 0
    assert (tune[0].parent / "my-tune-v2-Q8_0.gguf").is_file()
    assert "my-tune-v2-Q8_0.gguf" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["beside", "folder", "named"])
def test_pair_writes_both_copies_in_one_run(tune, tmp_path, place):
    folder = tmp_path / "out"
    folder.mkdir()
    words = ["quantize", str(tune[0]), "--pair", str(tune[1]), "--level", "Q8_0"]
    words += {"beside": [], "folder": ["--out", str(folder)], "named": []}[place]
    words += ["--out", str(folder / "cond.gguf")] if place == "named" else []
    assert main(words) == 0
    where = tmp_path if place == "beside" else folder
    names = {path.name for path in where.glob("*.gguf")}
    first = "cond.gguf" if place == "named" else "my-tune-v2-Q8_0.gguf"
    assert names == {first, "my-tune-v2-uncond-Q8_0.gguf"}
    for source, made in ((tune[0], first), (tune[1], "my-tune-v2-uncond-Q8_0.gguf")):
        alone = tmp_path / "alone.gguf"
        assert main(["quantize", str(source), "--level", "Q8_0", "--out", str(alone)]) == 0
        assert alone.read_bytes() == (where / made).read_bytes()
        alone.unlink()


def test_nothing_is_written_where_the_second_file_is_in_the_way(tune, capsys):
    (tune[0].parent / "my-tune-v2-uncond-Q8_0.gguf").write_bytes(b"mine")
    words = ["quantize", str(tune[0]), "--pair", str(tune[1]), "--level", "Q8_0"]
    assert main(words) == 1
    assert "my-tune-v2-uncond-Q8_0.gguf: exists already" in capsys.readouterr().err
    assert not (tune[0].parent / "my-tune-v2-Q8_0.gguf").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_of_the_quantizer(name):
    preset = preset_of(name, calibrated=True)
    QuantOptions(**preset.options)
    assert recipe_of(preset.level).level == preset.level
    with pytest.raises(QuantOptionError, match="Calibrate Ideogram 4"):
        preset_of(name, calibrated=False)


def test_a_nodes_error_speaks_of_its_inputs(tmp_path):
    (tmp_path / "x.gguf").touch()
    with pytest.raises(OutputExistsError) as caught, in_words_of_the_node(("overwrite",)):
        check_output(tmp_path / "x.gguf")
    assert "(the node's input overwrite)" in str(caught.value)
    assert "--" not in str(caught.value)
    said = for_the_node("Say which one (--copy conditional).", ("copy",))
    assert said == "Say which one (the node's input copy conditional)."
    assert for_the_node("Give it (--calibration CAL).", ("calibration",)) == (
        "Give it (the node's input calibration)."
    )


@pytest.mark.parametrize("level", ["INT8", "Q4_K_M"])
def test_what_a_level_is_taken_for_is_said_once(level, tmp_path, caplog, capsys):
    source = files.save(tmp_path / "tune.safetensors", files.model())
    assert main(["quantize", str(source), "--level", level, "--copy", "conditional"]) == 0
    assert sum(record.getMessage().startswith(f"{level}: ") for record in caplog.records) == 1


def test_decibels_carry_a_word():
    assert off_by(20.0) == "off by 10 % (20.00 dB)"
    assert off_by(40.0) == "off by 1 % (40.00 dB)"
    assert off_by(math.inf) == "exact"
