"""Guidance from one resident copy in a real ComfyUI, against two models loaded apart."""

from __future__ import annotations

import pytest

from ideogram4_quant.tests.test_host_clones import (  # noqa: F401  (fixtures)
    WITHIN,
    files,
    folder,
)

pytestmark = pytest.mark.host
CASES = ("unconditional LoRA", "a LoRA on either", "one on both", "image tokens alone")
RESIDENCIES = ("auto", "both", "alternating", "streamed", "LOW_VRAM", "NO_VRAM")
STEPS = 3


@pytest.fixture(scope="module")
def runs(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("one_copy.py", files, folder, "runs", seconds=1500)


@pytest.fixture(scope="module")
def compiled(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("one_copy.py", files, folder, "compiled", seconds=1500)


@pytest.fixture(scope="module")
def others(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("one_copy.py", files, folder, "others")


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("how", ["unfused", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_two_models_loaded_apart(runs, level, how, case):
    found = runs[f"{level}, {how}, {case}"]
    assert found["effect"] > 0.01
    for residency in RESIDENCIES:
        assert found[residency] < STEPS * WITHIN[level], residency
    assert found["LOW_VRAM, left"] > 0
    assert found["left"] == 0


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("fused", [False, True])
def test_no_trace_is_left_of_a_run(runs, level, fused):
    assert runs[f"{level}, {fused}, without"]


@pytest.mark.parametrize("what", ["whole", "blocks"])
@pytest.mark.parametrize("how", ["unfused", "fused"])
@pytest.mark.parametrize("case", CASES[:2])
def test_compiled_passes_never_take_each_others_lora(compiled, what, how, case):
    found = compiled[f"{what}, {case}, {how}"]
    assert max(found["errors"]) < STEPS * WITHIN["BF16"]
    assert found["frames"][0] == found["frames"][1]  # nothing is compiled again in the second run
    assert not found["breaks"]


def test_the_bypass_of_the_host_is_in_its_own_pass_alone(others):
    assert others["bypass"] < STEPS * WITHIN["BF16"]
    assert others["left"] == 0


def test_patches_of_weights_that_both_have_are_in_both(others):
    assert others["weights alike"] < STEPS * WITHIN["BF16"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("weights", "different patches of its weights"),
        ("other weights", "one model is connected as both copies"),
        ("objects", "different patches of its objects"),
        ("by accident", "one model is connected as both copies"),
        ("a clone by accident", "one model is connected as both copies"),
        ("another model", "but another model is connected"),
    ],
)
def test_what_one_copy_cannot_do_is_refused_with_the_reason(others, case, words):
    assert words in others["refused"][case]


def test_a_stand_in_is_refused_where_its_lora_would_be_lost(others):
    assert "would run both passes alike" in others["stock guider"]


def test_a_failure_within_the_unconditional_pass_leaves_nothing(others):
    found = others["interrupted"]
    assert found["raised"]
    assert not found["patcher left"]
    assert found["again"] < STEPS * WITHIN["BF16"]
    assert found["left"] == 0


def test_one_copy_and_the_loras_of_either_pass_are_loaded_by_one_request(others):
    assert others["asked"] == [["Ideogram4", "LowRankModel", "LowRankModel"]]
