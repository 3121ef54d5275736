"""Calibrate, quantize, verify, inspect and compare by command, as a user does with a fine-tune."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.pocket import paths
from ideogram4_quant.tests import quant_model as model
from ideogram4_quant.tests.test_quant_sources import fp8_per_row, split_names

COPIES = {"conditional": paths.dit_path("cond"), "unconditional": paths.dit_path("uncond")}
LEVELS = {"INT8 W8A8 rotated": 35, "INT8 W8A8": 35, "Q8_0": 35, "Q6_K": 29, "Q5_K": 24, "Q4_K": 18}
"""Level -> what weights keep of a gaussian at least, in dB."""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "cal.safetensors"
    words = ["calibrate", COPIES["conditional"], "--uncond", COPIES["unconditional"]]
    words += ["--encoder", paths.encoder_dir(), "--out", out, "--limit", 2, "--steps", 2]
    words += ["--tokens", 16, "--channels", 64, "--types", "Q4_K"]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.mark.parametrize(
    ("level", "options", "least"),  # dB of outputs: smoothing and feedback spend weights on them
    [
        ("INT8 W8A8 rotated", ("--treatment", "auto", "--protect-budget", "8%"), 50),
        ("INT8 W8A8", (), 45),
        ("Q4_K", (), 30),
        (None, ("--target-gb", "0.0045"), 35),
    ],
)
def test_a_model_of_ones_own_from_calibration_to_report(
    calibration, level, options, least, tmp_path, capsys
):
    files = []
    for copy, source in COPIES.items():
        out = tmp_path / f"{copy}.{'gguf' if level in (None, 'Q4_K') else 'safetensors'}"
        words = ["quantize", str(source), "--out", str(out)]
        words += [] if level is None else ["--level", level]
        words += ["--calibration", str(calibration), *options]
        assert main([*words, "--dry-run"]) == 0
        assert not out.exists()
        assert main(words) == 0
        report = capsys.readouterr().out
        words = ["verify", str(out), "--against", str(source), "--json"]
        assert main([*words, "--calibration", str(calibration)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["output_db"] > max(least, found["sqnr_db"])
        assert "outputs" in report
        assert main(["inspect", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["copies"] == [copy]
        if "--target-gb" in options:
            assert out.stat().st_size <= 4.5e6
        else:
            assert found["level"] == level
        if "--protect-budget" in options:
            assert len(found["protected"]) == 7 + 2
        files.append(out)
    png = tmp_path / "picture.png"
    words = ["generate", "--model", files[0], "--uncond", files[1], "--out", png, "--prompt", "HI"]
    words += ["--encoder", paths.encoder_dir(), "--vae", paths.vae_dir(), "--steps", 1]
    words += ["--width", 128, "--height", 64]
    assert main([str(word) for word in words]) == 0
    assert png.stat().st_size > 500


def fp8_scaled(weights):
    """ComfyUI's older FP8: one scale a tensor, named ``scale_weight``, and a marker."""
    stored = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if module not in model.linear_names():
            stored[name] = tensor
            continue
        scale = tensor.float().abs().amax() / 448
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{module}.scale_weight"] = scale
    return stored | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as every kind of file that a fine-tune comes in."""
    folder, weights = tmp_path_factory.mktemp("sources"), model.weights()
    folders = folder / "diffusers" / "transformer"
    folders.mkdir(parents=True)
    model.write(folders / "diffusion_pytorch_model.safetensors", split_names(weights))
    found = {"BF16": folder / "bf16.safetensors", "diffusers": folder / "diffusers"}
    model.write(found["BF16"], weights)
    for name, stored in (("row", fp8_per_row(weights)[0]), ("scaled", fp8_scaled(weights))):
        found[f"FP8 {name}"] = folder / f"fp8_{name}_conditional.safetensors"
        save_file(stored, found[f"FP8 {name}"])
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["BF16", "diffusers", "FP8 row", "FP8 scaled"])
def test_every_source_to_every_level(sources, kind, level, tmp_path, capsys):
    out = tmp_path / f"out.{'gguf' if level[0] == 'Q' else 'safetensors'}"
    source = ["--copy", "conditional"] if kind == "diffusers" else []
    words = ["quantize", str(sources[kind]), "--level", level, "--out", str(out), *source]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--against", str(sources[kind]), *source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert LEVELS[level] < found["sqnr_db"] < 60
    assert open_checkpoint(out).level == level
