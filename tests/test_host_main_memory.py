"""Main memory that a load takes in the real ComfyUI, against what the doctor says of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import ModelConfig, open_checkpoint, open_encoder
from ideogram4_quant.checkpoint.canonical import canonical_shapes
from ideogram4_quant.checkpoint.encoders import encoder_shapes
from ideogram4_quant.diagnostics.doctor.main_memory import bytes_held, bytes_in_memory
from ideogram4_quant.pocket import paths
from ideogram4_quant.tests.host.level_files import write_level

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MB = 10**6
LEVELS = ("BF16", "FP8", "INT8 W8A8 rotated", "Q8_0", "Q4_K", "NF4")
# 66 million weights, most of them in linears of the blocks as in the real model
SIZES = {"num_layers": 5, "num_attention_heads": 4, "intermediate_size": 2816, "adaln_dim": 256}
CONFIG = ModelConfig(**SIZES, llm_features_dim=2048)
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4}


def weights(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: (torch.randn(shape, generator=generator) / 30).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, Path, Path]]:
    """name -> (kind, file or folder, a small one of its kind)."""
    folder = tmp_path_factory.mktemp("main_memory")
    source = folder / "bf16_conditional.safetensors"
    save_file(weights(canonical_shapes(CONFIG)), source, {"config": json.dumps(CONFIG.to_dict())})
    found = {
        level: ("model", write_level(source, level, folder, "conditional"), paths.dit_path("cond"))
        for level in LEVELS
    }
    pocket = paths.encoder_dir()
    encoder = folder / "encoder"
    shutil.copytree(pocket, encoder)
    config = json.loads((pocket / "config.json").read_text()) | WIDE
    (encoder / "config.json").write_text(json.dumps(config))
    save_file(weights(encoder_shapes(config)), encoder / "model.safetensors")
    return found | {"encoder": ("encoder", encoder, pocket)}


@pytest.fixture(scope="module")
def found(files, in_host) -> dict:
    listing = {name: [kind, *map(str, rest)] for name, (kind, *rest) in files.items()}
    return in_host("main_memory.py", json.dumps(listing))


def entries(files, name: str) -> list:
    kind, path, _ = files[name]
    if kind == "encoder":
        return list(open_encoder(path).entries.values())
    return list(open_checkpoint(path).entries["conditional"].values())


@pytest.mark.parametrize("name", [*LEVELS, "encoder"])
def test_a_load_holds_what_the_doctor_says(found, files, name):
    """The rest is mapped: of 45 MB and more a few hundred kB are held, the model's own objects."""
    assert bytes_in_memory(entries(files, name), 2) > 45 * MB
    assert found[name]["counted"] == pytest.approx(
        bytes_in_memory(entries(files, name), 2), rel=0.01
    )
    assert found[name]["loaded"] == pytest.approx(bytes_held(entries(files, name), 2), abs=2 * MB)


@pytest.mark.parametrize("name", [*LEVELS, "encoder"])
def test_on_the_way_it_takes_a_few_tensors_more(found, files, name):
    """However it is stored: 6 MB are its largest tensor in bf16; what is mapped counts if read."""
    assert found[name]["peak"] < bytes_held(entries(files, name), 2) + 20 * MB


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_used_is_what_is_stored(files, level):
    stored = files[level][1].stat().st_size
    assert bytes_in_memory(entries(files, level), 2) == pytest.approx(stored, rel=0.01)
