"""What a file asks of the attention: read, followed behind ``auto`` alone, and said."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.nodes.attention_choice import followed
from ideogram4_quant.ops.dispatch import BackendReport
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
