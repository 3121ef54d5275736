"""Graphs through the server of a real ComfyUI: pictures, caching, and errors it survives."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.server import PACK_FOLDER, Rejected, Run, Server

pytestmark = pytest.mark.host
NODES = (
    "Ideogram4QuantLoad",
    "Ideogram4QuantLoadEncoder",
    "Ideogram4QuantLoadVAE",
    "Ideogram4QuantLoadLora",
    "Ideogram4QuantCheckCaption",
    "Ideogram4QuantSampler",
    "Ideogram4QuantGuider",
    "Ideogram4QuantPreset",
)


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict:
    return server.get("/object_info")


def picture(server: Server, run: Run, node: str = "saved") -> np.ndarray:
    assert run.status == "success", run.error
    data = server.fetch(run.outputs[node]["images"][0])
    return np.asarray(Image.open(io.BytesIO(data)))


def text(run: Run, node: str) -> str:
    return run.outputs[node]["text"][0]


def test_pack_loads_under_a_name_with_hyphens(object_info):
    for name in NODES:
        assert object_info[name]["python_module"] == f"custom_nodes.{PACK_FOLDER}"


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_has_a_tooltip(object_info, name):
    info = object_info[name]
    for group in info["input"].values():
        for key, (_, *options) in group.items():
            if key not in info["input"].get("hidden", {}):
                assert options, f"{name}.{key}"
                assert options[0].get("tooltip"), f"{name}.{key}"
    assert all(info["output_tooltips"])
    assert info["search_aliases"]
    assert info["description"]


def test_help_page_of_every_node_is_served(server):
    for name in NODES:
        page = server.read(f"/extensions/{PACK_FOLDER}/docs/{name}.md")
        assert page.startswith(b"# "), name


def test_guider_and_sampler_make_the_same_picture(server):
    first = picture(server, server.run(graphs.with_guider()))
    second = picture(server, server.run(graphs.with_sampler()))
    assert first.shape == (64, 128, 3)
    assert first.std() > 1
    assert np.array_equal(first, second)


def test_second_run_reads_no_file(server):
    graph = graphs.with_guider(seed=11)
    assert server.run(graph).status == "success"
    marks = len(server.log)
    again = server.run(graphs.with_guider(seed=12))
    assert again.status == "success"
    assert {"model", "encoder", "vae", "positive"} <= set(again.cached)
    assert "model weight dtype" not in server.log[marks:]


def test_unconditional_is_read_only_if_connected(server):
    marks = len(server.log)
    alone = graphs.with_guider(seed=13, models=(("model", 0), None), backend="reference")
    assert server.run(alone).status == "success"
    assert server.log[marks:].count("model_type FLOW") == 1
    marks = len(server.log)
    both = graphs.with_guider(seed=13, backend="reference")
    assert server.run(both).status == "success"
    assert server.log[marks:].count("model_type FLOW") == 2


def test_picture_says_what_it_was_made_with(server):
    run = server.run(graphs.with_guider(seed=14, level="auto", gguf_compute="16-bit"))
    data = server.fetch(run.outputs["saved"]["images"][0])
    note = json.loads(Image.open(io.BytesIO(data)).text["ideogram4_quant"])
    assert note["asked"] == "auto"
    assert note["level"] == "BF16"
    assert note["files"]["conditional"]["name"] == "tiny_ideogram4_cond.safetensors"
    assert len(note["files"]["unconditional"]["fingerprint"]) == 64


def test_report_names_files_copies_and_memory(server):
    graph = graphs.parts() | {"shown": graphs.node("PreviewAny", source=("model", 2))}
    shown = text(server.run(graph), "shown")
    for expected in ("level: BF16", "tiny_ideogram4_cond", "model_type", "memory:", "backend:"):
        assert expected in shown


def fails_with(server: Server, graph: dict, *words: str) -> None:
    """The run fails with a message that has these words, and the next run works."""
    run = server.run(graph)
    assert run.status == "error"
    message = run.error["exception_message"]
    for word in words:
        assert word in message
    assert picture(server, server.run(graphs.with_sampler())).shape == (64, 128, 3)
    assert server.alive()


def test_missing_level_says_what_there_is(server):
    fails_with(server, graphs.with_sampler(level="Q4_K"), "Q4_K", "BF16", "diffusion_models")


def test_swapped_copies_are_refused(server):
    swapped = {
        "conditional_file": "tiny_ideogram4_uncond.safetensors",
        "unconditional_file": "tiny_ideogram4_cond.safetensors",
    }
    fails_with(server, graphs.with_sampler(**swapped), "tiny_ideogram4_uncond", "conditional")


def test_swapped_connections_are_refused(server):
    graph = graphs.with_sampler(models=(("model", 1), ("model", 0)))
    fails_with(server, graph, "unconditional copy", "Swap")


def test_truncated_file_is_named(server, models):
    whole = (models / "diffusion_models" / "tiny_ideogram4_cond.safetensors").read_bytes()
    cut = models / "diffusion_models" / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    try:
        fails_with(
            server, graphs.with_sampler(conditional_file=cut.name), "cut.safetensors", "ownload"
        )
    finally:
        cut.unlink()


def test_other_models_are_refused_by_name(server, models):
    graph = graphs.with_sampler()
    graph["model"]["inputs"]["conditional_file"] = "other.safetensors"
    other = models / "diffusion_models" / "other.safetensors"
    other.write_bytes((models / "vae" / graphs.TINY_VAE).read_bytes())
    try:
        fails_with(server, graph, "other.safetensors")
    finally:
        other.unlink()


def test_sizes_off_the_grid_are_refused_with_the_nearest(server):
    fails_with(server, graphs.with_sampler(size=(130, 64)), "128", "144")


def test_long_captions_are_refused(server):
    fails_with(server, graphs.with_sampler(caption="word " * 3000), "2048")


def test_names_outside_the_folders_are_rejected_before_running(server):
    for name in ("../../server.log", "/etc/passwd", "missing.safetensors"):
        with pytest.raises(Rejected) as caught:
            server.run(graphs.with_sampler(conditional_file=name))
        assert name in str(caught.value)
    assert server.alive()
