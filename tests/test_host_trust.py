"""Out of memory, cancelled, offline and many times over, in a real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.quant import quantize_checkpoint

pytestmark = pytest.mark.host
LEVELS = {"INT8 W8A8": "safetensors", "Q8_0": "gguf", "Q4_K": "gguf"}


@pytest.fixture(scope="module")
def inputs(pocket, tmp_path_factory) -> tuple[str, dict[str, list[str]], Path]:
    """(the pocket model's parts as JSON, level -> files of both copies, a LoRA)."""
    folder = tmp_path_factory.mktemp("trust")
    files = {
        "conditional": str(pocket.conditional_file),
        "unconditional": str(pocket.unconditional_file),
        "encoder": str(pocket.encoder_dir),
        "vae": str(pocket.vae_file),
    }
    levels = {"BF16": [files["conditional"], files["unconditional"]]}
    for level, ending in LEVELS.items():
        levels[level] = []
        for copy in ("conditional", "unconditional"):
            out = folder / f"{level.replace(' ', '_')}-{copy}.{ending}"
            quantize_checkpoint(files[copy], level, out, copy=copy)
            levels[level].append(str(out))
    lora = folder / "lora.safetensors"
    save_file(small_lora(pocket.conditional_file), lora)
    return json.dumps(files), levels, lora


@pytest.fixture(scope="module")
def found(inputs, in_host) -> dict:
    files, levels, lora = inputs
    conditional = {level: pair[0] for level, pair in levels.items()}
    return in_host("trust.py", files, json.dumps(conditional), lora)


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
    print(f"resident {warm / 1e6:.0f} MB after one cycle, at most {max(cycles) / 1e6:.0f} MB later")
    assert max(cycles) < 1.02 * warm, [round(c / warm, 4) for c in cycles]


@pytest.mark.slow
def test_two_hundred_pictures_in_a_row(inputs, in_host):
    """Levels, LoRAs, residencies and cancellations in turn: no growth, and the same pictures."""
    files, levels, lora = inputs
    soak = in_host("soak.py", files, json.dumps(levels), lora, "200", seconds=7200)
    assert soak["pictures"] == 200
    assert soak["cancelled"] == 28
    assert soak["kinds"] == 8
    assert soak["wrong"] == []
    memory = [round(m / 1e6) for m in soak["memory"]]
    print(f"resident {min(memory)} to {max(memory)} MB, at first {memory[0]}, at last {memory[-1]}")
    warm, rest = max(soak["memory"][:5]), soak["memory"][5:]  # it swings with what is loaded
    assert max(rest) < 1.02 * warm, [round(m / warm, 4) for m in soak["memory"]]
