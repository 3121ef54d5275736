"""LoRAs of our node in a real ComfyUI's sampling: residency, memory accounting, torch.compile."""

from __future__ import annotations

import pytest

from ideogram4_quant.tests.test_host_clones import (  # noqa: F401  (fixtures)
    LINEARS,
    WITHIN,
    files,
    folder,
)

pytestmark = pytest.mark.host
COPIES = ("conditional", "unconditional")
FLOAT32 = 4
RESIDENCIES = ("both", "alternating", "streamed", "LOW_VRAM", "NO_VRAM")


@pytest.fixture(scope="module")
def runs(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("side_paths.py", files, folder, "runs")


@pytest.fixture(scope="module")
def memory(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("side_paths.py", files, folder, "memory")


@pytest.fixture(scope="module")
def compiled(files, folder, in_host) -> dict:  # noqa: F811
    return in_host("side_paths.py", files, folder, "compiled", seconds=1500)


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_latents_are_those_of_the_dense_formula(runs, level, residency):
    assert runs[f"{level}, effect"] > 0.05
    assert runs[f"{level}, {residency}"] < 3 * WITHIN[level]  # three steps
    assert runs[f"{level}, without"]


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_on_a_full_card_the_lora_stays_in_memory_as_the_model_does(runs, level, state):
    conditional, first, unconditional, second = runs[f"{level}, {state}, modules left"]
    assert conditional > 0
    assert unconditional > 0
    assert first == second == 2 * LINEARS


def test_the_host_counts_the_tensors_of_a_lora(memory):
    assert memory["bytes"] == [memory["elements"] * FLOAT32] * 2
    assert memory["loaded"] == memory["bytes"]
    assert "LowRankModel" in memory["counted"]


@pytest.mark.parametrize("keep", ["both", "streamed"])
def test_loras_are_asked_for_with_the_models(memory, keep):
    assert memory[f"asked, {keep}"] == [[*sorted(f"LoRA of {c}" for c in COPIES), *COPIES]]


def test_each_turn_asks_for_a_copy_and_its_lora(memory):
    first, second = ([f"LoRA of {copy}", copy] for copy in COPIES)
    assert memory["asked, alternating"] == [first, second, first, second]


def test_what_is_loaded_is_not_loaded_again(memory):
    assert sorted(memory["moved, both"]) == sorted([*COPIES, *(f"LoRA of {c}" for c in COPIES)])
    assert memory["moved, alternating"] == []


def test_a_lora_leaves_the_device_with_its_model(memory):
    assert memory["detached"] == [0, memory["bytes"][1]]
    assert memory["unloaded"] == [0, 0]


def test_nothing_keeps_a_model_or_its_lora_alive(memory):
    assert memory["freed"] == [True, True]


@pytest.mark.parametrize("level", WITHIN)
@pytest.mark.parametrize("kind", ["fused", "unfused"])
def test_a_compiled_model_has_the_lora_and_is_compiled_once(compiled, level, kind):
    found = compiled[f"{level}, {kind}"]
    assert found["own model"]
    assert found["effect"] > 0.05
    assert max(found["errors"]) < 3 * WITHIN[level]
    assert found["frames"] == [1, 1, 1]  # put in three times
    assert not found["breaks"]
    assert found["without"]
