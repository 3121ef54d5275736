"""The host's merging nodes and its saving of CLIPs and whole checkpoints, on our models."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.test_host_memory import REQUANTIZED

pytestmark = pytest.mark.host
COPIES = ("conditional", "unconditional")


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("merging")
    sources = pocket.conditional_file, pocket.unconditional_file
    files = {
        level: [
            str(write_level(source, level, folder, copy))
            for source, copy in zip(sources, COPIES, strict=True)
        ]
        for level in REQUANTIZED
    }
    return in_host("merging.py", json.dumps(files), pocket.encoder_dir, pocket.vae_file)


@pytest.mark.parametrize("level", REQUANTIZED)
def test_a_16_bit_model_merges_into_one_of_any_level(found, level):
    result = found[level]
    assert result["error"] <= REQUANTIZED[level]  # what encoding the sum costs
    assert result["apart"] > 0.1  # it is neither of the two
    assert result["finite"]
    assert result["gone"] == 0


@pytest.mark.parametrize("level", REQUANTIZED)
def test_a_quantized_model_as_the_second_is_an_error_in_words(found, level):
    result = found[f"{level} second"]
    if level == "BF16":
        assert result["error"] == 0
        return
    assert result.startswith("OpError: ComfyUI takes this model's weights apart")
    assert "Load BF16 files for the models to merge" in result


@pytest.mark.parametrize("what", ["clip", "whole"])
def test_a_saved_encoder_is_read_as_what_it_was(found, what):
    """Beside its tokenizer, where its vocabulary is not the released one."""
    assert found["saved"][what] == 0
    assert "needs its tokenizer" in found["saved"][f"{what}, alone"]


def test_a_model_saved_with_its_encoder_and_vae_is_read_as_what_it_was(found):
    # last bits: sums on a CPU depend on where weights lie, and the file read again is mapped
    assert found["saved"]["model"] < 1e-6
