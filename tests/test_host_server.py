"""Graphs through the server of a real ComfyUI: pictures, reports, caching, interruption."""

from __future__ import annotations

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.locate import PACK
from ideogram4_quant.tests.host.runs import fails_with, picture, text
from ideogram4_quant.tests.host.server import PACK_FOLDER, Server

pytestmark = pytest.mark.host
NODES = sorted(page.stem for page in (PACK / "web" / "docs").glob("*.md"))  # one a node


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict:
    return server.get("/object_info")


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


@pytest.mark.parametrize("name", NODES)
def test_help_page_is_served_and_names_every_input_and_output(server, object_info, name):
    page = server.read(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
    info = object_info[name]
    assert page.startswith(f"# {info['display_name']}\n")
    inputs = (key for group in ("required", "optional") for key in info["input"].get(group, {}))
    for word in (*inputs, *info["output_name"]):
        assert re.search(rf"(?<!\w){word}(?!\w)", page), word


def test_guider_and_sampler_make_the_same_picture(server):
    first = picture(server, server.run(graphs.with_guider()))
    second = picture(server, server.run(graphs.with_sampler()))
    assert first.shape == (64, 128, 3)
    assert first.std() > 1
    assert np.array_equal(first, second)


@pytest.mark.parametrize("level", ["BF16", "INT8 W8A8", "Q8_0", "Q4_K"])
def test_words_are_readable_at_every_level(server, reader, level):
    right = 0
    for prompt in HELD_OUT[:3]:
        graph = graphs.with_sampler(
            level=level, caption=prompt.caption, preset="default", seed=prompt.seed
        )
        shown = Image.fromarray(picture(server, server.run(graph)))
        right += reader.read(shown) == prompt.word
    assert right >= 2


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    from ideogram4_quant.engine.ocr import WordReader

    return WordReader()


def test_our_models_in_the_stock_guider_make_the_same_picture(server):
    ours = graphs.with_guider("ours", guider={"guidance": "7"})
    stock = graphs.with_guider("stock")
    stock["guider"] = graphs.node(
        "DualModelGuider",
        model=("model", 0),
        model_negative=("model", 1),
        positive=("positive", 0),
        cfg=7.0,
    )
    first = picture(server, server.run(ours)).astype(int)
    second = picture(server, server.run(stock)).astype(int)
    assert np.abs(first - second).max() <= 1


def test_schedule_is_the_hosts_and_one_of_its_own_goes_before_the_preset(server):
    size = (256, 256)  # the host's node takes no less
    ours, host = (graphs.with_guider(name, size=size) for name in ("ours", "host"))
    sampler = graphs.with_sampler("own", size=size, preset="default")
    sampler["sampled"]["inputs"] |= {"sigmas": ["preset", 0], "guidance": "7*11, 3"}
    for graph in (host, sampler):
        graph["preset"] = graphs.node(
            "Ideogram4Scheduler", steps=12, width=256, height=256, mu=0.5, std=1.75
        )
    first, *others = (picture(server, server.run(graph)) for graph in (ours, host, sampler))
    assert all(np.array_equal(first, other) for other in others)


def test_image_to_image_keeps_more_of_the_picture_the_less_is_denoised(server):
    start = graphs.with_sampler("start", seed=21)
    original = picture(server, server.run(start)).astype(float)
    distances = []
    for denoise in (0.3, 1.0):
        graph = dict(start)
        graph["encoded"] = graphs.node("VAEEncode", pixels=("decoded", 0), vae=("vae", 0))
        graph["again"] = {
            "class_type": "Ideogram4QuantSampler",
            "inputs": start["sampled"]["inputs"]
            | {"latent": ["encoded", 0], "denoise": denoise, "seed": 22},
        }
        graph["decoded2"] = graphs.node("VAEDecode", samples=("again", 0), vae=("vae", 0))
        graph["saved2"] = graphs.node("SaveImage", images=("decoded2", 0), filename_prefix="i2i")
        found = picture(server, server.run(graph), "saved2").astype(float)
        distances.append(np.abs(found - original).mean())
    assert distances[0] < 0.7 * distances[1]


def test_inpainting_leaves_the_rest_alone(server):
    start = graphs.with_sampler("start", seed=21)
    graph = start | {
        "encoded": graphs.node("VAEEncode", pixels=("decoded", 0), vae=("vae", 0)),
        "mask": graphs.node("SolidMask", value=1.0, width=64, height=64),
        "none": graphs.node("SolidMask", value=0.0, width=128, height=64),
        "half": graphs.node(
            "MaskComposite",
            destination=("none", 0),
            source=("mask", 0),
            x=64,
            y=0,
            operation="add",
        ),
        "masked": graphs.node("SetLatentNoiseMask", samples=("encoded", 0), mask=("half", 0)),
    }
    graph["again"] = {
        "class_type": "Ideogram4QuantSampler",
        "inputs": start["sampled"]["inputs"] | {"latent": ["masked", 0], "seed": 22},
    }
    graph["decoded1"] = graphs.node("VAEDecode", samples=("encoded", 0), vae=("vae", 0))
    graph["saved1"] = graphs.node("SaveImage", images=("decoded1", 0), filename_prefix="kept")
    graph["decoded2"] = graphs.node("VAEDecode", samples=("again", 0), vae=("vae", 0))
    graph["saved2"] = graphs.node("SaveImage", images=("decoded2", 0), filename_prefix="inpaint")
    run = server.run(graph)
    kept, found = (picture(server, run, n).astype(float) for n in ("saved1", "saved2"))
    difference = np.abs(found - kept).mean(axis=(0, 2))
    assert difference[:32].mean() < 0.2 * difference[96:].mean()


def test_batch_gives_other_pictures_and_the_first_is_the_single_one(server):
    single = picture(server, server.run(graphs.with_sampler("one", seed=31)))
    run = server.run(graphs.with_sampler("two", seed=31, sampler={"batch_size": 2}))
    pictures = [
        np.asarray(Image.open(io.BytesIO(server.fetch(image)))).astype(int)
        for image in run.outputs["saved"]["images"]
    ]
    assert len(pictures) == 2
    assert np.abs(pictures[0] - single).max() <= 2
    assert np.abs(pictures[1] - single).mean() > 5


def test_savings_are_reported(server):
    settings = {"guidance_end": 0.5, "reuse_unconditional": 2}
    shown = text(server.run(graphs.with_sampler("saved", sampler=settings)), "report")
    assert "passes: 12 conditional, 3 unconditional" in shown
    assert "3 reused, 6 skipped" in shown
    assert "saved 38% of the passes" in shown
    assert "copies on the device: both" in shown
    assert "trained sides" not in shown  # those of the test model


def test_sides_are_those_that_this_model_was_trained_on(server):
    size = {"size": (256, 256), "sampler": {"steps": 1}}
    shown = text(server.run(graphs.with_sampler("large", **size)), "report")
    assert "256x256 is outside the trained sides, 64 to 128" in shown


def test_freed_memory_is_filled_again_with_the_same(server):
    before = picture(server, server.run(graphs.with_sampler("freed", seed=15)))
    server.post("/free", {"unload_models": True, "free_memory": True})
    marks = len(server.log)
    deadline = time.monotonic() + 30
    while server.get("/queue")["queue_pending"] and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # the server frees between two prompts
    again = server.run(graphs.with_sampler("freed", seed=15))
    assert np.array_equal(picture(server, again), before)
    assert not again.cached
    assert server.log[marks:].count("model_type FLOW") == 2


def test_without_the_unconditional_copy_there_is_no_guidance(server):
    alone = graphs.with_sampler("alone", models=(("model", 0), None))
    shown = text(server.run(alone), "report")
    assert "without guidance" in shown
    assert "half the passes" in shown
    assert "the caption is followed less closely" in shown
    at_one = graphs.with_sampler("one", sampler={"guidance": "1"})
    first = picture(server, server.run(alone))
    assert np.array_equal(first, picture(server, server.run(at_one)))


def test_checked_captions_run_and_broken_ones_stop(server):
    graph = graphs.with_sampler("checked")
    graph["checked"] = graphs.node("Ideogram4QuantCheckCaption", caption=graphs.CAPTION)
    graph["positive"]["inputs"]["text"] = ["checked", 0]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert "checked" in run.outputs
    graph["checked"]["inputs"]["caption"] = "{"
    fails_with(server, graph, "no valid JSON")


def test_plain_text_is_painted_and_warned_about_on_the_node_and_in_the_log(server):
    warning = "This is plain text. The model was trained on JSON captions"
    marks = len(server.log)
    graph = graphs.with_sampler("plain", caption="a cat on a mat")
    assert server.run(graph).status == "success"
    assert server.log[marks:].count(warning) == 1  # the encoder's own
    graph["checked"] = graphs.node("Ideogram4QuantCheckCaption", caption="a dog on a mat")
    graph["positive"]["inputs"]["text"] = ["checked", 0]
    run = server.run(graph)
    assert run.status == "success", run.error
    assert warning in text(run, "checked")


def test_second_run_reads_no_file(server):
    graph = graphs.with_guider(seed=11)
    assert server.run(graph).status == "success"
    marks = len(server.log)
    again = server.run(graphs.with_guider(seed=12))
    assert again.status == "success"
    assert {"model", "encoder", "vae", "positive"} <= set(again.cached)
    assert "model_type FLOW" in server.log[:marks]
    assert "model_type FLOW" not in server.log[marks:]


def test_unconditional_is_read_only_if_connected(server):
    marks = len(server.log)
    alone = graphs.with_guider(seed=13, models=(("model", 0), None), backend="reference")
    assert server.run(alone).status == "success"
    assert server.log[marks:].count("model_type FLOW") == 1
    marks = len(server.log)
    both = graphs.with_guider(seed=13, backend="reference")
    assert server.run(both).status == "success"
    assert server.log[marks:].count("model_type FLOW") == 2


def test_interrupting_stops_the_run_and_the_next_one_works(server):
    long = graphs.with_sampler("long", preset="quality", size=(512, 512), seed=5)
    prompt_id = server.post("/prompt", {"prompt": long})["prompt_id"]
    marks = len(server.log)
    deadline = time.monotonic() + 120
    while "/48" not in server.log[marks:] and time.monotonic() < deadline:
        time.sleep(0.1)
    server.post("/interrupt", {})
    run = server.wait(prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in run.messages]
    assert "saved" not in run.outputs
    assert server.run(graphs.with_sampler()).status == "success"


def test_picture_says_what_it_was_made_with(server):
    run = server.run(graphs.with_guider(seed=14, level="auto"))
    data = server.fetch(run.outputs["saved"]["images"][0])
    note = json.loads(Image.open(io.BytesIO(data)).text["ideogram4_quant"])
    assert note["asked"] == "auto"
    assert note["level"] == "INT8 W8A8"
    assert note["files"]["conditional"]["name"] == "pocket-INT8_W8A8-conditional.safetensors"
    assert len(note["files"]["unconditional"]["fingerprint"]) == 64


def test_second_picture_of_a_cached_loader_says_what_it_was_made_with_too(server):
    notes = []
    for seed in (21, 22):
        run = server.run(graphs.with_sampler(seed=seed, level="auto"))
        data = server.fetch(run.outputs["saved"]["images"][0])
        notes.append(json.loads(Image.open(io.BytesIO(data)).text["ideogram4_quant"]))
    assert "model" in run.cached
    assert notes[1] == notes[0]
    assert notes[1]["level"] == "INT8 W8A8"


def test_report_names_files_copies_and_memory(server):
    graph = graphs.parts(details=True) | {"shown": graphs.node("PreviewAny", source=("model", 2))}
    shown = text(server.run(graph), "shown")
    assert shown.startswith("BF16, both copies, ")
    for expected in ("fingerprint", graphs.CONDITIONAL, "model_type", "memory:", "backend:"):
        assert expected in shown
    graph["model"]["inputs"]["level"] = "Q4_K"
    shown = text(server.run(graph), "shown")
    assert "computed as W8A8: differences show side by side to BF16 on the pocket model" in shown
    assert "unmeasured on a GPU" in shown
