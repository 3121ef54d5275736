"""Models that do not fit, in a real ComfyUI: the same latents from partial loads, every layout."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant.tests.host.level_files import write_level

pytestmark = pytest.mark.host
LEVELS = (
    *("BF16", "FP8", "INT8 W8A8 rotated", "INT8 W8A8", "Q8_0", "Q4_K", "IQ4_XS", "NF4"),
    *("W4A8", "W6A8", "INT4 W4A4", "NVFP4", "MXFP8", "AWQ W4A16", "SDNQ 4-bit"),
)
FUSED = "INT8 W8A8 rotated"
CASES = (*LEVELS, f"{FUSED}, fused")


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lowvram")
    pair = {"conditional": pocket.conditional_file, "unconditional": pocket.unconditional_file}
    files = {
        level: {copy: str(write_level(file, level, folder, copy)) for copy, file in pair.items()}
        for level in LEVELS
    }
    return in_host("lowvram.py", json.dumps(files), FUSED)


def test_the_hosts_flags_cannot_be_given_on_a_cpu(found):
    assert found["flags"] == {"--lowvram": True, "--novram": True}  # else they could be used here


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_a_host_short_of_memory_streams_both_copies(found, case, state):
    result = found[case][state]
    assert result["same"]
    assert all(count > 0 for count in result["left"])


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_a_model_can_be_unloaded_and_loaded_again(found, case):
    half, none, some, whole = found[case]["by budget"]
    assert 0 < half["left"] < none["left"]
    assert 0 < some["left"] < none["left"]
    assert whole["left"] == 0
    assert all(step["same"] for step in (half, none, some, whole))
