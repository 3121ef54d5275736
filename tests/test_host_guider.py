"""The guider among the host's own machinery: loading, patches, wrappers, hooks, failures."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host
SIGMAS = (1.0, 0.8, 0.5, 0.2)
LAYERS = 4
IMAGE_TOKENS = 32


@pytest.fixture(scope="module")
def found(pocket, in_host) -> dict:
    files = {
        "conditional": str(pocket.conditional_file),
        "unconditional": str(pocket.unconditional_file),
        "encoder": str(pocket.encoder_dir),
    }
    return in_host("guider.py", json.dumps(files))


def test_both_copies_are_loaded_by_one_request(found):
    assert found["one request"] == [["conditional", "unconditional"]]


def test_copies_that_take_turns_move_once_a_step(found):
    turns = found["turns"]
    first, second = "conditional", "unconditional"
    assert turns["passes"] == [first, second, second, first] * 2
    assert turns["loads"] == [[first], [second], [first], [second], [first]]
    assert turns["same"]


def test_streamed_copies_are_asked_for_once_and_leave_no_room_for_weights(found):
    streamed = found["streamed"]
    assert streamed["models"] == ["conditional", "unconditional"]
    assert streamed["memory"] > 1e15
    assert streamed["after"] < 1e12  # the wish ends with its run
    assert streamed["same"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("model", "the conditional model is not Ideogram 4 (found Linear)"),
        ("unconditional", "the unconditional model is not Ideogram 4 (found Linear)"),
        ("encoder", "comes from another text encoder (found 7 features a token"),
        ("long", "the caption is too long (found 2049 tokens, needed at most 2048)"),
    ],
)
def test_what_is_of_something_else_is_refused(found, case, words):
    assert words in found["refused"][case]


def test_progress_and_previews_reach_the_page(found):
    assert found["progress"] == [[step, 3, "JPEG"] for step in (1, 2, 3)]


def test_each_step_runs_both_copies_at_its_sigma(found):
    wanted = [[copy, s] for s in SIGMAS for copy in ("conditional", "unconditional")]
    assert found["order"] == wanted


def test_models_of_the_stock_loader_give_the_same(found):
    assert found["stock models"] == {"guider": True, "sampler": True}


@pytest.mark.parametrize("copy", ["conditional", "unconditional"])
def test_patch_on_one_copy_stays_there(found, copy):
    result = found["patch stays"][copy]
    assert result["same"]
    assert result["calls"] == LAYERS * len(SIGMAS)
    (length,) = result["lengths"]
    assert (length == IMAGE_TOKENS) == (copy == "unconditional")


def test_wrappers_of_the_unconditional_copy_run(found):
    assert found["wrapper of the other"] == len(SIGMAS)


def test_prompts_of_different_lengths_run_apart_without_a_mask(found):
    assert found["no mask"] == {"masked": 0, "lengths": 3}  # two captions, and the image alone


def test_cfg_override_goes_before_the_schedule(found):
    assert found["cfg override"]


def test_patches_can_tell_the_passes_apart(found):
    marks, sigmas = found["marked"]
    assert marks == {"conditional": [0], "unconditional": [1]}
    assert sigmas == {"conditional": len(SIGMAS) + 1, "unconditional": len(SIGMAS) + 1}


def test_failure_in_the_middle_leaves_nothing_behind(found):
    assert found["clean after failure"] == {"raised": True, "left": 0, "same": True}


def test_post_cfg_hooks_see_the_schedule(found):
    assert found["post cfg"] == [7.0, 7.0, 7.0, 3.0]


def test_pre_cfg_functions_run_as_in_the_hosts_cfg(found):
    pre = found["pre cfg"]
    assert pre["scales"] == [7.0, 7.0, 7.0, 3.0]
    assert not pre["alike before"]
    assert pre["error"] < 1e-6 < 1e-2 < pre["effect"]


def test_functions_in_place_of_the_hosts_predictions_run(found):
    """They did nothing in this sampler (SkipLayerGuidanceDiTSimple)."""
    batch = found["batch"]
    assert batch["asked"] == [["conditional", [True, False]], ["unconditional", [False, True]]] * 4
    assert batch["error"] < 1e-5


def test_functions_run_where_guidance_is_off(found):
    one = found["one copy"]
    assert one["before"] == [[1.0, 0.0]] * 4
    assert one["after"] == [1.0] * 4
    assert one["error"] == 0


def test_second_order_sampler_takes_the_guidance_of_each_sigma(found):
    wanted = {1.0: 7.0, 0.8: 7.0, 0.5: 7.0, 0.2: 3.0}
    assert found["second order"]
    assert all(scale == wanted[sigma] for sigma, scale in found["second order"])
