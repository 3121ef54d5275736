"""The fused blocks in a real ComfyUI: equal to unfused ones, removable, and out of others' way."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.test_host_lora import fused, update

pytestmark = pytest.mark.host
LEVELS = ("BF16", "INT8 W8A8", "INT8 W8A8 rotated", "Q4_K")
# In the pocket's four blocks: one quantization for qkv, one for w1 and w3, one for w2 each.
ALL = 12
WITHIN = 1e-3
# Of a picture, where one ulp somewhere turns roundings to int8 in all that follows: q and k an ulp
# off are 2.9e-3 at Q4_K. It says that results arrive (q without its norm's weight: 46e-3, one head
# turned the other way: 0.3); that they are right is asked of each call.
ROUNDED = 5e-3
SILENT = ("nothing", "hook on everything", "training")


@pytest.fixture(scope="module")
def found(pocket, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("fused")
    save_file(fused(update(1)), folder / "fused.safetensors")
    source = pocket.conditional_file
    files = {level: str(write_level(source, level, folder, "conditional")) for level in LEVELS}
    return in_host("fused.py", json.dumps(files), folder)


@pytest.mark.parametrize("level", LEVELS)
def test_fused_blocks_equal_the_hosts(found, level):
    assert found[level]["plain"] < WITHIN
    assert found[level]["quantizers"] == (0 if level == "BF16" else ALL)


@pytest.mark.parametrize("level", LEVELS)
def test_the_kernel_of_q_and_k_makes_the_same_picture(found, level):
    # fp32 against fp64: 0.8e-7, each value one ulp off 1.2e-7, ten times eps 1.2e-6
    assert len(found[level]["rope, each"]) == 4  # once a block
    assert max(found[level]["rope, each"]) < 3e-7
    assert found[level]["rope"] < (1e-6 if level == "BF16" else ROUNDED)


@pytest.mark.parametrize("level", LEVELS)
def test_comfy_kitchens_norms_make_the_same_picture(found, level):
    if "kitchen" not in found[level]:
        pytest.skip("this host's comfy-kitchen makes no norms (0.2.40 does)")
    # qkv, w1 and w3 of four blocks, and no others
    expected = ALL if level == "INT8 W8A8 rotated" else 0
    assert found[level]["kitchen, norms"] == len(found[level]["kitchen, each"]) == expected
    # a few roundings to int8 fall the other way: 1.4e-4; without the norm's weight it is 0.1
    assert max(found[level]["kitchen, each"], default=0.0) < WITHIN
    assert found[level]["kitchen"] < ROUNDED
    assert found[level]["kitchen, side path"] < ROUNDED


@pytest.mark.parametrize("level", LEVELS)
def test_removed_they_leave_no_trace(found, level):
    assert found[level]["removed"]
    assert found[level]["forwards left"] == 0
    assert found[level]["again"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["patches", "side path", "bypass", "partial"])
def test_a_lora_acts_as_on_the_hosts_blocks(found, level, how):
    assert found[level][how] < WITHIN
    assert how == "partial" or found[level][f"{how}, effect"] > 10 * WITHIN  # it does something


@pytest.mark.parametrize("level", LEVELS[1:])
def test_only_what_a_lora_touches_steps_aside(found, level):
    # The LoRA is on qkv of block 0 and on w2 of block 1; the patches of a full load are encoded.
    assert found[level]["patches, quantizers"] == ALL
    assert found[level]["side path, quantizers"] == ALL - 2
    assert found[level]["bypass, quantizers"] == ALL - 2


@pytest.mark.parametrize("level", LEVELS)
def test_a_clone_with_a_model_of_its_own_runs_its_own_blocks(found, level):
    assert found[level]["follows"]
    assert found[level]["copy"]


@pytest.mark.parametrize(
    ("change", "quantizers", "status"),
    [
        ("nothing", ALL, "on"),
        ("hook on w1", ALL, "feed_forward.w1 has a forward hook: it gets plain input (blocks 0)"),
        ("hook on qkv", ALL - 1, "attention.qkv has a forward hook: it gets plain input"),
        ("hook on o", ALL, "on"),
        ("hook on attention", ALL - 1, "attention has a forward hook: it gets plain input"),
        ("hook on a norm", ALL - 3, "ffn_norm1 has a forward hook: the block runs unfused"),
        ("hook on the feed-forward", ALL - 3, "feed_forward has a forward hook: the block runs"),
        ("hook on everything", 0, "every module has a hook: the blocks run unfused"),
        ("another forward of w2", ALL - 1, "feed_forward.w2 has a replaced forward: it gets"),
        ("another forward of attention", ALL - 1, "attention has a replaced forward: it gets"),
        ("another forward of a norm", ALL - 3, "attention_norm2 has a replaced forward: the block"),
        ("dense weight", ALL, "feed_forward.w1 has a patch applied on the fly: it gets plain"),
        ("training", 0, "on"),
    ],
)
def test_what_another_node_changes_is_left_in_force(found, change, quantizers, status):
    result = found["server's own"][change]
    assert result["error"] < WITHIN
    assert (result["effect"] > 10 * WITHIN) == (change not in SILENT)
    assert result["quantizers"] == quantizers
    assert status in result["status"]


def test_the_loader_says_whether_blocks_are_fused_and_the_sampler_how_they_ran(server):
    for asked, loaded, sampled in (
        ("auto", "fused blocks: off: the Triton kernels do not run here", None),
        ("on", "fused blocks: on, as asked", "fused blocks, unconditional: on"),
    ):
        graph = graphs.with_sampler("fused", fused_blocks=asked, details=True)
        graph["sampled"]["inputs"]["details"] = True
        for name, source in (("shown", ("model", 2)), ("told", ("sampled", 1))):
            graph[name] = graphs.node("PreviewAny", source=source)
        run = server.run(graph)
        assert run.status == "success", run.error
        assert loaded in run.outputs["shown"]["text"][0]
        report = run.outputs["told"]["text"][0]
        assert "fused blocks" not in report if sampled is None else sampled in report


def test_what_cannot_be_split_is_refused(server):
    graph = graphs.with_sampler("fused")
    graph["model"]["inputs"] |= {"fused_blocks": "on", "backend": "comfy_kitchen"}
    run = server.run(graph)
    assert run.status == "error"
    assert "blocks cannot be fused" in run.error["exception_message"]
