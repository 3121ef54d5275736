"""What the pack costs a real ComfyUI whose folders hold other models: at the start, and a queue."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

FOREIGN = 200
KEYS = {
    "diffusion_models": "double_blocks.{}.img_mod.lin.weight",
    "text_encoders": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "loras": "lora_unet_down_blocks_{}_attentions_0.lora_up.weight",
    "vae": "decoder.up_blocks.{}.resnets.0.conv1.weight",
}


def write_foreign(path: Path, key: str) -> None:
    """The header of a model of others, of 1000 tensors; its data is a hole."""
    header = {
        key.format(i): {"dtype": "F16", "shape": [4, 4], "data_offsets": [32 * i, 32 * i + 32]}
        for i in range(1000)
    }
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 32 * len(header))


@pytest.fixture(scope="module")
def found(in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("foreign")
    for number in range(FOREIGN):
        kind = list(KEYS)[number % len(KEYS)]
        write_foreign(folder / kind / f"other-{number}.safetensors", KEYS[kind])
    return in_host("registration.py", folder)


def test_registering_brings_no_heavy_module_along(found):
    """Half a second of CPU was asked; twice that is left to a busy machine."""
    assert found["nodes"] >= 12
    assert found["heavy"] == []
    assert found["registered"] < 1.0


def test_the_first_queue_opens_each_file_once(found):
    """Encoders twice: heads, which no list loads by themselves, are told from them first."""
    first = found["queues"][0]
    assert first["files"] == FOREIGN
    assert first["opens"] == FOREIGN + FOREIGN // len(KEYS)


def test_the_next_queue_opens_none_of_them(found):
    """50 ms of CPU were asked; a busy machine may take four times as long."""
    second = found["queues"][1]
    assert second["opens"] == 0
    assert second["seconds"] < 0.2
