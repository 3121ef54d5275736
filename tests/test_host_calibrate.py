"""The calibration node on the real host: its figures are the engine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ideogram4_quant.engine.calibrate import Prompt, calibrate
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.pocket import data
from ideogram4_quant.quant import Calibration
from ideogram4_quant.quant.captions import calibration_captions
from ideogram4_quant.quant.profiler import ProfilerOptions
from ideogram4_quant.quant.provenance import hash_files

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def caption() -> str:
    return data.prompt_batch("calibration", 1)[0].caption


@pytest.fixture(scope="module")
def found(pocket, in_host, caption, tmp_path_factory) -> dict:
    text = tmp_path_factory.mktemp("caption") / "caption.txt"
    text.write_text(caption, encoding="utf-8")
    files = {
        "conditional": str(pocket.conditional_file),
        "unconditional": str(pocket.unconditional_file),
        "encoder": str(pocket.encoder_dir),
        "caption": str(text),
    }
    return in_host("calibrate.py", json.dumps(files))


def test_the_file_holds_what_the_engine_measures(found, pocket, caption):
    here = Calibration.load(found["paths"][0])
    pair = open_pair(pocket.conditional_file, pocket.unconditional_file)
    features = load_encoder(pocket.encoder_dir).encode([caption])[0]
    wanted = calibrate(
        load_pair(pair, None, None),
        [Prompt(caption, features)],
        GenerateRequest("", 128, 64, preset="turbo", steps=3),
        seeds=[7],
        digests={},
        options=ProfilerOptions(),
    )
    assert here.layers.keys() == wanted.layers.keys()
    assert here.times == pytest.approx(wanted.times, abs=1e-5)
    for key, stats in wanted.layers.items():
        host = here.layers[key]
        assert host.shape == stats.shape, key
        assert host.weight_absmax.tolist() == stats.weight_absmax.tolist(), key
        if ".layers." not in key:
            continue  # the host runs text and image tokens alike through the stem
        assert host.tokens == stats.tokens, key
        # the host draws other noise from a seed: the statistics agree, not the values
        energy = stats.square_sum.sum().item()
        assert host.square_sum.sum().item() == pytest.approx(energy, rel=0.2), key
        for name in ("int8", "int8 rotated", "Q4_K"):
            if name in stats.noise:
                assert host.sqnr_db(name) == pytest.approx(stats.sqnr_db(name), abs=2.5), key
    digests = [file.sha256 for file in hash_files([pocket.conditional_file])]
    assert [here.provenance[0].models["conditional"]] == digests


def test_runs_are_chained_numbered_and_leave_the_models_alone(found):
    paths = [Path(path) for path in found["paths"]]
    assert [path.name for path in paths] == [
        "pocket_00001_.safetensors",
        "pocket_00002_.safetensors",
    ]
    assert paths[0].parent.name == "cal"
    assert found["runs"] == 2
    assert len(Calibration.load(paths[1]).provenance) == 2
    assert found["hooks"] == 0
    assert "most fragile" in found["report"]


def test_without_a_caption_of_ones_own_the_shipped_ones_are_sampled(found, pocket):
    here = Calibration.load(found["shipped_path"])
    assert here.provenance[0].prompts == 2
    encoder = load_encoder(pocket.encoder_dir)
    texts = calibration_captions(2)
    wanted = calibrate(
        load_pair(open_pair(pocket.conditional_file, pocket.unconditional_file), None, None),
        [Prompt(text, encoder.encode([text])[0]) for text in texts],
        GenerateRequest("", 128, 64, preset="turbo", steps=3),
        seeds=[7],
        digests={},
        options=ProfilerOptions(),
    )
    for key, stats in wanted.layers.items():
        if ".layers." in key:
            assert here.layers[key].tokens == stats.tokens, key
            energy = here.layers[key].square_sum.sum().item()
            assert energy == pytest.approx(stats.square_sum.sum().item(), rel=0.2), key
    assert "Connect clip" in found["nothing"]


@pytest.mark.parametrize("copy", ["conditional", "unconditional"])
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("side path", "ideogram4_quant_lora"),
        ("patched", "1 patched weights"),
        ("bypassed", "bypass_lora"),
    ],
)
def test_a_model_with_a_lora_is_refused_whichever_way_it_came(found, copy, way, words):
    message = found["refused"][f"{copy}, {way}"]
    assert message.startswith(f"the {copy} brings a LoRA")
    assert words in message
    assert "Take the LoRA off" in message


def test_a_caption_that_brings_a_lora_is_refused(found):
    assert found["refused"]["caption"].startswith("the caption brings a LoRA")
