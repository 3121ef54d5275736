"""One branch in a real ComfyUI: found, sampled without guidance, refused with a second copy."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant.tests.test_one_branch_files import renamed

pytestmark = pytest.mark.host
NAME = "Ideogram4-instant_bf16.safetensors"


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    files = {
        "conditional": str(pocket.conditional_file),
        "unconditional": str(pocket.unconditional_file),
        "encoder": str(pocket.encoder_dir),
    }
    one = renamed(tmp_path_factory.mktemp("one"), NAME)
    return in_host("one_branch.py", one, json.dumps(files))


def test_loader_knows_it_and_the_switch_goes_before_the_name(found):
    chosen = found["chosen"]
    assert chosen["auto"] == chosen["note"] == f"the name {NAME} says so"
    assert chosen["second"]
    assert chosen["picked"]
    assert chosen["two"]
    assert chosen["forced"]
    assert "one branch: needs no guidance and no unconditional copy" in chosen["text"]
    assert "half a model" not in chosen["text"]
    assert "half a model" in chosen["half"]


def test_sampler_says_that_no_guidance_is_needed(found):
    for preset, steps in (("instant", 8), ("default", 20)):
        report = found[preset]
        assert f"passes: {steps} conditional\n" in report
        assert "one branch, so no guidance is needed" in report
        assert "without guidance, as no unconditional copy" not in report
    assert "its guidance is left out here" in found["default"]
    assert "its guidance is left out here" not in found["instant"]
    assert "8 steps" in found["unsettled"]


def test_it_is_sampled_as_the_conditional_copy_alone(found):
    assert found["same"] == 0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("second copy", "Remove the connection on the unconditional input"),
        ("second copy, default", "Remove the connection on the unconditional input"),
        ("guidance", "guidance is asked of a model of one branch, which holds it in itself"),
        ("preset", "the preset instant runs without guidance"),
        ("guidance 1", "taken"),
        ("own guidance", "taken"),
    ],
)
def test_what_doubles_time_or_ruins_the_picture_is_refused(found, case, words):
    assert words in found[case]


def test_preset_without_its_model_is_said_in_the_report(found):
    assert "made for the TurboTime LoRA" in found["turbotime"]
    assert "set branches to one in the loader" in found["plain instant"]


def test_values_of_older_workflows_keep_their_places(found):
    """A workflow's file holds a node's values by their order alone."""
    inputs = found["inputs"]
    older = [
        "level", "conditional_file", "unconditional_file", "base_file", "trust_files", "backend",
        "gguf_compute", "attention", "fused_blocks", "branches",
        "unconditional_lora", "unconditional_level", "int8_compute",
    ]  # fmt: skip
    assert inputs["load"][: len(older)] == older
    older = ["residency", "unconditional_from", "sigmas", "schedule_mu", "last_sigma"]
    first = inputs["sampler"].index("residency")
    assert inputs["sampler"][first : first + 5] == older
    assert inputs["sampler"][first + 5 :] == ["aspect_ratio", "megapixels", "details", "vae"]
    assert inputs["preset"] == [
        "preset", "width", "height", "steps", "denoise", "schedule_mu", "last_sigma",
    ]  # fmt: skip
    assert inputs["presets"] == ["quality", "default", "turbo", "instant", "fast", "turbotime"]


def test_models_of_the_stock_loader_are_known_by_name(found):
    assert found["stock"] == [f"the name {NAME} says so", None]


def test_saved_by_the_host_it_keeps_the_mark(found):
    assert found["saved"] == "metadata ideogram4.guidance is 'none'"
