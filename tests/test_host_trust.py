"""Out of memory, cancelled, offline and many times over, in a real ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.pocket import paths
from ideogram4_quant.quant import quantize_checkpoint

pytestmark = pytest.mark.host
LEVELS = {"INT8 W8A8": "safetensors", "Q8_0": "gguf", "Q4_K": "gguf"}


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("trust")
    files = {
        "conditional": str(pocket.conditional_file),
        "unconditional": str(pocket.unconditional_file),
        "encoder": str(pocket.encoder_dir),
        "vae": str(pocket.vae_file),
    }
    levels = {"BF16": str(pocket.conditional_file)}
    for level, ending in LEVELS.items():
        out = folder / f"{level.replace(' ', '_')}.{ending}"
        quantize_checkpoint(paths.dit_path("cond"), level, out, copy="conditional")
        levels[level] = str(out)
    lora = folder / "lora.safetensors"
    save_file(small_lora(pocket.conditional_file), lora)
    return in_host("trust.py", json.dumps(files), json.dumps(levels), lora)


def small_lora(model) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on the first layer's attention."""
    from ideogram4_quant.checkpoint import open_checkpoint

    n, k = open_checkpoint(model).shapes("conditional")["layers.0.attention.qkv.weight"]
    generator = torch.Generator().manual_seed(3)
    stem = "diffusion_model.layers.0.attention.qkv"
    return {
        f"{stem}.lora_A.weight": torch.randn(2, k, generator=generator) * k**-0.5,
        f"{stem}.lora_B.weight": torch.randn(n, 2, generator=generator) * 0.1,
    }


def test_out_of_memory_in_a_step_goes_on_bit_identically(found):
    results = found["out of memory"]
    assert results.pop("after")
    assert len(results) == 8
    for case, (same, kept) in results.items():
        assert same, case
        assert kept == ("alternating" if case.startswith("both") else "streamed"), case


def test_a_single_copy_is_streamed_then(found):
    assert found["alone"] == [True, "streamed"]


def test_a_lora_survives_the_move(found):
    assert found["with a LoRA"] == {"acts": True, "both": True, "alternating": True, "gone": True}


def test_the_repeated_pass_keeps_reuse_and_second_order_right(found):
    assert found["reuse"]
    assert found["heun"]


@pytest.mark.parametrize("keep", ["both", "alternating", "streamed"])
def test_out_of_memory_again_says_what_to_change(found, keep):
    message, known_to_the_host = found["twice"][keep]
    assert known_to_the_host
    assert "out of device memory in a step" in message
    assert "GB free" in message
    assert "a smaller picture or batch, a smaller level" in message
    assert found["twice"]["after"]


def test_other_errors_are_not_taken_for_it(found):
    assert found["other errors"] == "RuntimeError: shapes differ"


def test_a_cancel_in_the_middle_of_a_step_leaves_nothing_behind(found):
    assert found["cancelled"] == {"raised": True, "left": 0, "same": True}


def test_loading_sampling_and_decoding_need_no_network(found):
    assert found["offline"]["tried"] == []
    assert found["offline"]["same"]
    assert found["offline"]["picture"][-1] == 3


def test_ten_cycles_of_loading_and_unloading_return_the_memory(found):
    _, warm, *cycles = found["cycles"]
    assert len(cycles) == 10
    assert max(cycles) < 1.02 * warm, [round(c / warm, 4) for c in cycles]
