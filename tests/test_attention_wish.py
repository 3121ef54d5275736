"""What a file asks of the attention: read, followed behind ``auto`` alone, and said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.nodes.attention_choice import followed
from ideogram4_quant.ops.dispatch import BackendReport
from ideogram4_quant.quant import QuantOptions, quantize_checkpoint
from ideogram4_quant.tests import fixtures_files as files
from ideogram4_quant.tests.fixtures_storage import as_json

THERE = (BackendReport("sdpa", True, "torch"), BackendReport("int8", True, "comfy-kitchen"))
ABSENT = (THERE[0], BackendReport("int8", False, "needs CUDA"))


def wish_of(path, *told):
    stored = files.model()
    for layer, said in enumerate(told):
        stored[f"layers.{layer}.attention.comfy_attention.config"] = said
    return open_checkpoint(files.save(path / "m.safetensors", stored)).attention_wish


INT8 = {"attention": "comfy_kitchen_int8"}


def test_a_known_wish_is_told_by_this_packs_name(tmp_path):
    assert wish_of(tmp_path, as_json(INT8), as_json(INT8)) == "int8"
    assert wish_of(tmp_path) is None


@pytest.mark.parametrize(
    "told",
    [
        (as_json({"attention": "sage9"}),),
        (as_json(INT8), as_json({"attention": "sage9"})),
        (as_json([1]),),
        (as_json({"attention": 7}),),
        (torch.tensor([0xFF, 0x7B], dtype=torch.uint8),),
    ],
)
def test_what_is_not_understood_is_no_wish_and_one_line(told, tmp_path, caplog):
    assert wish_of(tmp_path, *told) is None
    lines = [record for record in caplog.records if "attention" in record.message]
    assert len(lines) == 1
    assert "is not followed" in lines[0].message


def test_it_is_followed_behind_auto_where_the_device_has_it(caplog):
    assert followed("auto", "int8", THERE) == ("int8", True)
    assert followed("auto", None, THERE) == ("auto", False)
    assert followed("host", "int8", THERE) == ("host", False)
    assert followed("sdpa", "int8", THERE) == ("sdpa", False)
    assert not caplog.records
    assert followed("auto", "int8", ABSENT) == ("auto", False)
    assert "needs CUDA" in caplog.text


@pytest.fixture
def asking(tmp_path):
    """A file whose layers ask, each in its own words."""
    stored = files.model()
    asked = {}
    for layer, said in enumerate((INT8, {**INT8, "smooth_k": True})):
        asked[f"layers.{layer}.attention.comfy_attention.config"] = as_json(said)
    metadata = {"ideogram4.copy": "conditional"}
    return files.save(tmp_path / "asking.safetensors", stored | asked, metadata), asked


@pytest.mark.parametrize("level", ["INT8 W8A8", "BF16 to Q8_0", "transformer-lab"])
def test_written_files_keep_it(asking, tmp_path, level):
    source, asked = asking
    if level == "transformer-lab":
        options = QuantOptions(container="transformer-lab")
        out = tmp_path / "out.safetensors"
        quantize_checkpoint(source, "INT8 W8A8", out, copy="conditional", options=options)
    else:
        name = level.rpartition(" to ")[2]
        out = tmp_path / f"out{'.gguf' if name == 'Q8_0' else '.safetensors'}"
        quantize_checkpoint(source, name, out, copy="conditional")
    base = source if level == "transformer-lab" else None
    assert open_checkpoint(out, base).attention_wish == "int8"
    if level != "INT8 W8A8":
        return
    written = load_file(out)
    for key, said in asked.items():  # for the hosts that follow it, to the byte
        assert torch.equal(written[key], said)
    again = tmp_path / "again.gguf"
    quantize_checkpoint(out, "Q8_0", again, copy="conditional")
    assert open_checkpoint(again).attention_wish == "int8"


def test_an_interrupted_run_keeps_it(asking, tmp_path):
    source, _ = asking
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    quantize_checkpoint(source, "INT8 W8A8", whole, copy="conditional")

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, "INT8 W8A8", part, copy="conditional", keep_partial=True, progress=stop
        )
    quantize_checkpoint(source, "INT8 W8A8", part, copy="conditional", resume=True)
    assert part.read_bytes() == whole.read_bytes()


def test_a_word_in_metadata_that_is_not_known_is_no_wish(tmp_path):
    path = files.save(tmp_path / "m.safetensors", files.model(), {"ideogram4.attention": "sage9"})
    assert open_checkpoint(path).attention_wish is None
