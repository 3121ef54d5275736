"""Weights fetched a block ahead in a real ComfyUI: the same latents, in the modelled order."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.cards.streaming import _ORDER, ahead
from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.tests.host.level_files import write_level

pytestmark = pytest.mark.host
LEVELS = ("INT8 W8A8 rotated", "Q4_K")
CASES = [f"{level}{how}" for level in LEVELS for how in ("", ", fused", ", fused, LoRA")]
STEPS = 3


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("streaming")
    pair = {"conditional": pocket.conditional_file, "unconditional": pocket.unconditional_file}
    files = {
        level: {copy: str(write_level(file, level, folder, copy)) for copy, file in pair.items()}
        for level in LEVELS
    }
    shapes = open_checkpoint(pocket.conditional_file).shapes("conditional")
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for name in ("layers.0.attention.qkv", "layers.1.feed_forward.w2"):
        n, k = shapes[f"{name}.weight"]
        for part, shape in (("lora_A", (4, k)), ("lora_B", (n, 4))):
            values = torch.randn(shape, generator=generator) / 10
            lora[f"diffusion_model.{name}.{part}.weight"] = values
    save_file(lora, folder / "lora.safetensors")
    return in_host("streaming.py", json.dumps(files), folder / "lora.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_latents_are_the_very_same(found, case, state):
    assert found[case][state]["same"]
    assert found[case]["changed"] == ("LoRA" in case)


@pytest.mark.parametrize("case", CASES)
def test_events_come_in_the_order_that_is_simulated(found, case):
    """With nothing on the device every block of both copies is fetched, a block ahead."""
    result = found[case]["NO_VRAM"]
    wanted = [list(e) for e in ahead(result["blocks"], range(result["blocks"]), STEPS)]
    assert result["events"] == [wanted, wanted]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_kept_after_a_run(found, case):
    assert found[case]["NO_VRAM"]["left"] == [False, False]


@pytest.mark.parametrize("fused", ["False", "True"])
def test_the_hosts_queue_is_driven_block_by_block(found, fused):
    """Each block is asked for before it runs, and once more at the end, which lets the last go."""
    blocks = found[CASES[0]]["NO_VRAM"]["blocks"]
    wanted = [[what, i] for i in range(blocks) for what in ("pop", "attention")]
    assert found["queue"][fused] == [*wanted, ["pop", None]]


@pytest.mark.parametrize("fused", ["False", "True"])
def test_without_it_weights_come_in_the_order_that_is_simulated(found, fused):
    linears = [name for name in found["casts"][fused] if name in _ORDER]
    assert linears == [name for name in _ORDER if name != "attention"]


def test_the_host_reads_weights_from_their_files(found):
    assert all(result == [True, True] for result in found["slices"].values())


def test_a_file_that_is_cut_is_an_error_and_copies_do_not_care(found):
    assert "cut short while its weights were in use" in found["cut"]["False"]
    assert "Load the model again" in found["cut"]["False"]
    assert found["cut"]["True"] is None


def test_without_room_for_slots_it_is_slower_and_said_once_a_copy(found):
    assert found["room"]["same"]
    assert len(found["room"]["said"]) == 2


def test_a_block_out_of_memory_is_run_again_without_slots(found):
    assert found["oom"]["raised"] == 1
    assert found["oom"]["same"]
    assert len(found["oom"]["said"]) == 1
    assert found["oom"]["off"] is False  # the next run tries again
