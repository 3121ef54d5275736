"""Memory in a real ComfyUI: partial loads, dynamic VRAM's resolve step, unloading, two levels."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.test_host_lora import fused, update

pytestmark = pytest.mark.host
# relative errors of a weight of one layer, patched and encoded again: the encoding's own error,
# which is 1.4 times that of rounding to the nearest where the host's seed for stochastic rounding
# is followed (FP8, INT8, NF4)
REQUANTIZED = {
    "BF16": 1e-6,
    "FP8": 0.04,
    "INT8 W8A8 rotated": 0.012,
    "Q8_0": 0.007,
    "Q4_K": 0.09,
    "NF4": 0.135,
}
LEVELS = tuple(REQUANTIZED)


@pytest.fixture(scope="module")
def found(tiny, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("memory")
    save_file(fused(update(1)), folder / "fused.safetensors")
    files = {
        level: str(write_level(tiny.conditional_file, level, folder, "conditional"))
        for level in LEVELS
    }
    return in_host("memory.py", json.dumps(files), folder)


@pytest.mark.parametrize("level", LEVELS)
def test_unloaded_and_loaded_again_gives_the_same(found, level):
    assert found[level]["again"]


@pytest.mark.parametrize("level", LEVELS)
def test_partial_load_patches_on_the_fly(found, level):
    # the patched layers are dense there and encoded again in a full load
    assert found[level]["partial"] < REQUANTIZED[level]


@pytest.mark.parametrize("level", LEVELS)
def test_dynamic_memory_moves_patches_and_encodes_weights(found, level):
    for key, error in found[level]["dynamic"].items():
        exact = key == "dense" or level == "BF16"
        assert error < (1e-6 if exact else REQUANTIZED[level]), key


@pytest.mark.parametrize("level", LEVELS)
def test_host_can_load_a_second_model_from_the_source(found, level):
    assert found[level]["deep copy"]


@pytest.mark.parametrize("level", LEVELS)
def test_unloading_returns_the_memory(found, level):
    assert found[level]["freed"]


@pytest.mark.parametrize("level", LEVELS)
def test_linears_compile_without_graph_breaks(found, level):
    assert found[level]["graph breaks"] == 0


def test_two_levels_live_side_by_side(found):
    assert found["side by side"]
