"""A LoRA that ``delta`` made, loaded by a real ComfyUI's own LoRA loader."""

from __future__ import annotations

import pytest

from ideogram4_quant.quant.delta import DeltaOptions, make_delta

pytestmark = pytest.mark.host


def test_the_hosts_own_loader_patches_every_linear_of_it(pocket, in_host, tmp_path):
    lora = tmp_path / "delta.safetensors"
    options = DeltaOptions(rank=16, dtype="fp32")
    report = make_delta(pocket.conditional_file, pocket.unconditional_file, lora, options)
    found = in_host("delta.py", str(pocket.conditional_file), str(lora))
    assert found["modules"] == len(report.linears)
    assert found["effect"] > 0.01
    for name in ("stock", "ours"):
        assert found[name]["patched"] == found["modules"], name
        assert found[name]["error"] < 0.02 * found["effect"], name
