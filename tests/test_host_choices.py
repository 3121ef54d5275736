"""The choice of attention and of int8 backends in a real ComfyUI, through its own mechanisms."""

from __future__ import annotations

import pytest

from ideogram4_quant.quant import quantize_checkpoint

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def found(tiny, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("choices")
    file, user = folder / "tiny_int8.safetensors", folder / "user"
    user.mkdir()
    quantize_checkpoint(tiny.conditional_file, "INT8 W8A8", file, copy="conditional")
    return in_host("choices.py", file, user)


def test_attention_is_put_in_by_the_hosts_override_only_where_asked(found):
    assert found["installed"] == {"host": False, "sdpa": True, "auto": True}
    assert found["reloaded"]
    assert found["pytorch"]


def test_the_model_computes_the_same_with_every_attention(found):
    assert all(error < 1e-5 for error in found["errors"].values()), found["errors"]


def test_what_is_not_there_is_refused_at_load(found):
    assert "'int8' is not available on cpu" in found["refused"]["int8"]
    assert "unknown attention backend" in found["refused"]["flash"]


def test_a_mask_takes_the_hosts_masked_attention_and_says_so_once(found):
    assert found["mask_error"] < 1e-5
    assert len(found["mask_lines"]) == 1


def test_backends_are_measured_once_and_kept_in_the_users_folder(found):
    assert found["measured"]
    assert len(found["measured"]) == len(set(found["measured"])) == len(found["lines"])
    assert all("int_mm" in line and "reference" in line for line in found["lines"])
    assert len(found["kept"]) == 1
    assert found["kept"][0].startswith("__ideogram4_quant/measured-cpu-")


def test_the_layouts_hooks_work_with_the_hosts_comfy_kitchen(found):
    assert found["hooks"]["version"].startswith("0.2.")
    assert max(found["hooks"]["errors"].values()) < 2e-3
