"""What a real ComfyUI's save nodes write from our models: read again, by this pack and by stock."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.tests.fixtures_storage import as_json
from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.test_host_lora import fused, update

pytestmark = pytest.mark.host
SMOOTHED = "INT8 W8A8 smoothed"
LEVELS = (
    *("BF16", "INT8 W8A8", "INT8 W8A8 rotated", SMOOTHED, "Q8_0", "Q4_K", "FP8", "NF4"),
    "SDNQ 4-bit",
)
SAVED_AS = {"SDNQ 4-bit": "Q4_1"}  # the same codes, in blocks of GGUF
ASKING = ("INT8 W8A8", "FP8")  # and what is made of the first
ASKED = as_json({"attention": "comfy_kitchen_int8"})
NAMES = [name for level in LEVELS for name in (level, f"{level}, LoRA")]


def write_smoothed(plain, out) -> str:
    """The INT8 file with a smoothing vector at every layer: another model, but a whole one."""
    stored = load_file(plain)
    for name in [n for n in stored if n.endswith(".comfy_quant")]:
        module = name.removesuffix(".comfy_quant")
        columns = stored[f"{module}.weight"].shape[1]
        stored[f"{module}.smooth"] = 0.8 + 0.4 * (stored[f"{module}.weight"][0].float() / 127) ** 2
        assert stored[f"{module}.smooth"].shape == (columns,)
        text = b'{"format": "ideogram4_quant_int8"}'
        stored[name] = stored[name].new_tensor(list(text))
    with safe_open(plain, "pt") as opened:
        save_file(stored, out, opened.metadata())
    return str(out)


def ask_for_int8(path: str) -> None:
    """Layers that ask for int8 attention, as files in circulation do."""
    stored = load_file(path)
    asked = {f"layers.{i}.attention.comfy_attention.config": ASKED.clone() for i in range(4)}
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(stored | asked, path, metadata)


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("saving")
    save_file(fused(update(1)), folder / "fused.safetensors")
    files = {
        level: str(write_level(pocket.conditional_file, level, folder, "conditional"))
        for level in LEVELS
        if level != SMOOTHED
    }
    for level in ASKING:
        ask_for_int8(files[level])
    files[SMOOTHED] = write_smoothed(
        files["INT8 W8A8"], folder / "smoothed_conditional.safetensors"
    )
    return in_host("saving.py", json.dumps(files), folder), files


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_read_as_what_it_was(found, name):
    result, level = found[0][name], name.removesuffix(", LoRA")
    source = open_checkpoint(found[1][level])
    assert result["model"] == 0
    assert result["whole"] == 0
    assert result["copy"] == "conditional"
    assert "metadata" in result["reason"]
    assert result["level"] == SAVED_AS.get(level, source.level)
    assert result["attention"] == source.attention_wish
    assert (source.attention_wish == "int8") == (level in (*ASKING, SMOOTHED))
    assert result["config"] == json.loads(json.dumps(source.config.to_dict()))
    assert result["effect"] > 0.01 if name.endswith("LoRA") else result["effect"] == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("INT8") and SMOOTHED not in n])
def test_stock_reads_what_it_has_a_format_for(found, name):
    # other roundings of the same product
    assert found[0][name]["model, stock"] < 0.02
    assert found[0][name]["whole, stock"] < 0.02


@pytest.mark.parametrize("level", LEVELS)
def test_a_mapped_file_gives_what_a_copied_one_gives_but_for_its_addresses(found, level):
    """The other tests here run with --disable-mmap: a CPU's sums depend on where weights lie.

    The bytes are the same, and so is every bit of the output once the copies are put at addresses
    like the mapped ones. At their own, outputs differ by 3e-7, as float32 does; int8 activations
    that such a difference rounds the other way make 0.002 of it.
    """
    mapped = found[0][level]["mapped"]
    assert mapped["other bytes"] == []
    assert mapped["error, moved"] == 0
    assert mapped["error"] < (0.005 if level == SMOOTHED else 1e-6)
    assert mapped["other addresses"] or mapped["error"] == 0


def test_addresses_of_some_mapped_weights_are_not_a_copys(found):
    assert any(found[0][level]["mapped"]["other addresses"] for level in LEVELS)
