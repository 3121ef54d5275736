"""Every shipped workflow queued again in a real ComfyUI: the same words, picture and note.

The server is one of its own, with a custom node that counts which model files are opened.
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ideogram4_quant.checkpoint.level_order import LEVELS
from ideogram4_quant.tests.host import graphs, runs
from ideogram4_quant.tests.host.api_graph import api_graph
from ideogram4_quant.tests.host.locate import Host
from ideogram4_quant.tests.host.pocket_variant import pocket_variant, set_values
from ideogram4_quant.tests.host.server import Run, Server, make_base
from ideogram4_quant.tests.host.workflows import EXAMPLE
from ideogram4_quant.tests.test_host_lora import fused, update
from ideogram4_quant.tests.workflow_files import FILES, every_file, load, of_type

pytestmark = pytest.mark.host
LORA = "fused.safetensors"
NOTE = "ideogram4_quant"
MEASURED = r"[\d.]+(?= s\b)|(?<=peak memory: )[\d.]+"
WATCHER = """
import sys

from aiohttp import web
from server import PromptServer

OPENED = []
NODE_CLASS_MAPPINGS = {}


def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".safetensors", ".gguf")):
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch)


@PromptServer.instance.routes.get("/opened")
async def opened(request):
    found = list(OPENED)
    OPENED.clear()
    return web.json_response(found)
"""


@pytest.fixture(scope="module")
def own(host: Host, models: Path, tmp_path_factory) -> Iterator[Server]:
    base = make_base(tmp_path_factory.mktemp("again"))
    for folder in (base / "models").iterdir():
        folder.rmdir()
        folder.symlink_to(models / folder.name, target_is_directory=True)
    if not (models / "loras" / LORA).exists():
        save_file(fused(update(1)), models / "loras" / LORA)
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(base / "input" / EXAMPLE)
    (base / "custom_nodes" / "watcher.py").write_text(WATCHER)
    running = Server(host, base)
    yield running
    running.close()


def small(workflow: dict, seed: int = 1, prefix: str = "first") -> dict:
    """A shipped workflow on the pocket model: few steps, a small picture, a seed, a file name."""
    changed = pocket_variant(workflow, lora=LORA, seed=seed, preset="turbo")
    for node in of_type(changed, "SaveImage"):
        set_values(node, filename_prefix=f"{prefix}/Ideogram4")
    for node in of_type(changed, "Ideogram4QuantQuantize"):
        set_values(node, source=graphs.CONDITIONAL, pair=graphs.UNCONDITIONAL)
    return api_graph(changed)


def shown(server: Server, run: Run) -> tuple[dict, dict, dict]:
    """What a run ended in, by node: texts without what was measured, pixels, notes of pictures."""
    assert run.status == "success", run.error
    texts, pixels, notes = {}, {}, {}
    for name, output in run.outputs.items():
        if "text" in output:
            texts[name] = [re.sub(MEASURED, "-", text) for text in output["text"]]
        for image in output.get("images", []):
            if image["type"] != "output":
                continue
            picture = Image.open(io.BytesIO(server.fetch(image)))
            pixels[name] = np.asarray(picture).tobytes()
            notes[name] = json.loads(picture.info[NOTE]) if NOTE in picture.info else None
    return texts, pixels, notes


def queue(server: Server, graph: dict) -> tuple[tuple[dict, dict, dict], Run, list[str]]:
    """(what a run showed, the run, model files that were opened for it)."""
    server.get("/opened")
    run = server.run(graph)
    return shown(server, run), run, server.get("/opened")


def levels_of(graph: dict) -> set[str]:
    loaders = [n for n in graph.values() if n["class_type"] == "Ideogram4QuantLoad"]
    return {node["inputs"]["level"] for node in loaders}


def levels_in(note: dict | list | None) -> set[str]:
    """Of the note of one model, or of several."""
    assert note, "the picture does not say what it was made with"
    return {n["level"] for n in (note if isinstance(note, list) else [note])}


@every_file
def test_a_shipped_workflow_queued_again_says_and_does_the_same(file, own, written_to):
    workflow = load(file)
    own.post("/free", {"unload_models": True, "free_memory": True})  # of workflows before
    before = set(written_to.iterdir())
    first, _, opened = queue(own, small(workflow))
    assert opened
    made = set(written_to.iterdir()) - before
    if made:
        own.get("/object_info")  # R: the lists look once into files that are new
    again, second, opened = queue(own, small(workflow))
    assert opened == []
    graph = small(workflow)
    ran = {n["class_type"] for name, n in graph.items() if name not in second.cached}
    assert ran == set(), (ran, second.messages)
    assert again == first
    if of_type(workflow, "Ideogram4QuantQuantize"):
        deleted_files_are_made_again(own, graph, first[0], made)
        return
    assert not made
    wanted = levels_of(graph)
    for note in first[2].values():
        if "auto" in wanted:  # the note says which level that was
            assert levels_in(note) <= set(LEVELS)
            continue
        assert levels_in(note) <= wanted


def deleted_files_are_made_again(server: Server, graph: dict, texts: dict, made: set[Path]) -> None:
    assert len(made) == 2
    contents = {path: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    assert shown(server, server.run(graph))[0] == texts
    assert {path: path.read_bytes() for path in made} == contents


PAINTING = [file for file in FILES if "SaveImage" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", PAINTING, ids=lambda file: file.stem)
def test_another_seed_and_the_first_one_again_read_nothing_and_paint_the_same(file, own):
    workflow = load(file)
    first, _, _ = queue(own, small(workflow))
    other, run, opened = queue(own, small(workflow, seed=2, prefix="other"))
    assert opened == []
    loaders = [str(node["id"]) for node in workflow["nodes"] if "Load" in node["type"]]
    assert set(loaders) <= set(run.cached)
    assert all(other[1][name] != pixels for name, pixels in first[1].items())
    back, _, opened = queue(own, small(workflow, prefix="back"))
    assert opened == []
    assert back[1:] == first[1:]
    assert back[0] == first[0]
    assert other[2] == first[2]


def stock_sampler(prefix: str, seed: int) -> dict:
    """The host's KSampler on the conditional copy alone, with no node of ours at the latent."""
    graph = graphs.with_guider(prefix, seed=seed, level="Q4_K", models=(("model", 0), None))
    graph["sampled"] = graphs.node(
        "KSampler",
        model=("model", 0),
        seed=seed,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=("positive", 0),
        negative=("positive", 0),
        latent_image=("empty", 0),
        denoise=1.0,
    )
    return {k: v for k, v in graph.items() if k not in ("guider", "noise", "euler", "preset")}


def through_guider(prefix: str, seed: int) -> dict:
    return graphs.with_guider(prefix, seed=seed, level="Q4_K")


def of_our_sampler(prefix: str, seed: int) -> dict:
    return graphs.with_sampler(prefix, seed=seed, level="Q4_K")


@pytest.mark.parametrize("make", [through_guider, stock_sampler])
def test_pictures_of_the_host_s_samplers_say_what_they_were_made_with_at_every_queue(make, own):
    found = [queue(own, make(prefix, seed)) for prefix, seed in (("a", 11), ("b", 12), ("c", 11))]
    notes = [show[2]["saved"] for show, *_ in found]
    assert notes[0]["level"] == "Q4_K"
    assert len(notes[0]["files"]["conditional"]["fingerprint"]) == 64
    assert notes == notes[:1] * 3
    assert found[0][0][1] == found[2][0][1] != found[1][0][1]
    assert "model" in found[1][1].cached
    assert [opened for *_, opened in found[1:]] == [[], []]


@pytest.mark.parametrize("make", [through_guider, stock_sampler, of_our_sampler])
def test_a_picture_that_is_only_saved_anew_says_the_same(make, own):
    """The sampler is cached: a new name alone, and a new seed between."""
    queue(own, make("before", 21))
    first, *_ = queue(own, make("one", 22))
    again, run, _ = queue(own, make("two", 22))
    assert "sampled" in run.cached
    assert "saved" not in run.cached
    assert again[1:] == first[1:]
    assert first[2]["saved"]["level"] == "Q4_K"


def test_the_same_nodes_under_other_ids_say_the_same(own):
    """Of another tab: the host's cache does not look at ids."""
    graph = through_guider("ids", 24)
    first, *_ = queue(own, graph)
    renamed = json.dumps(through_guider("other ids", 24))
    for name in graph:
        renamed = re.sub(rf'"{name}"(?=: {{"class_type"|, \d)', f'"x{name}"', renamed)
    again, run, _ = queue(own, json.loads(renamed))
    assert "xsampled" in run.cached
    assert again[2]["xsaved"] == first[2]["saved"]


def test_a_cached_note_gives_way_to_that_of_another_level(own):
    levels = ["Q4_K", "Q8_0", "Q4_K"]
    graphs_of = [graphs.with_sampler(f"turn{i}", seed=23, level=v) for i, v in enumerate(levels)]
    notes = [queue(own, graph)[0][2]["saved"] for graph in graphs_of]
    assert [note["level"] for note in notes] == levels


def renamed(graph: dict, prefix: str) -> dict:
    """The same nodes under other ids."""
    ids = {name: f"{prefix} {name}" for name in graph}
    out = copy.deepcopy({ids[name]: node for name, node in graph.items()})
    for node in out.values():
        for link in (v for v in node["inputs"].values() if isinstance(v, list)):
            link[0] = ids[link[0]]
    return out


def test_a_picture_says_what_led_to_it_and_not_what_else_the_graph_samples(own):
    """Two samplers and a plain picture in one graph; then one is saved anew, all else cached."""
    both: dict = {}
    for level in ("Q4_K", "Q8_0"):
        both |= renamed(graphs.with_sampler(f"of {level}", seed=27, level=level), level)
    both["image"] = graphs.node("LoadImage", image=EXAMPLE)
    both["plain"] = graphs.node("SaveImage", images=("image", 0), filename_prefix="beside")
    for prefix in ("first", "again"):
        both["Q8_0 saved"]["inputs"]["filename_prefix"] = prefix
        (_, _, notes), *_ = queue(own, both)
        assert notes.pop("plain", None) is None
        assert levels_in(notes["Q8_0 saved"]) == {"Q8_0"}
        assert all(levels_in(note) == {name[:4]} for name, note in notes.items())


def test_a_copy_that_nothing_reads_is_not_in_the_note(own):
    graph = graphs.with_sampler("alone", seed=28, models=(("model", 0), None), level="Q4_K")
    (texts, _, notes), *_ = queue(own, graph)
    assert set(notes["saved"]["files"]) == {"conditional"}
    assert "both copies" not in str(texts)


def test_a_picture_of_another_model_has_no_note(own):
    image = graphs.node("LoadImage", image=EXAMPLE)
    saved = graphs.node("SaveImage", images=("image", 0), filename_prefix="plain")
    (_, pixels, notes), *_ = queue(own, {"image": image, "saved": saved})
    assert pixels["saved"]
    assert notes == {"saved": None}


@pytest.mark.parametrize("data", [None, {}, {"extra_pnginfo": None}, {"extra_pnginfo": []}])
def test_odd_requests_are_answered_as_without_the_pack(own, data):
    body = {"prompt": graphs.with_sampler(seed=3, level="Q4_K"), "extra_data": data}
    if data is None:
        del body["extra_data"]
    run = own.wait(own.post("/prompt", body)["prompt_id"])
    assert runs.picture(own, run).shape == (64, 128, 3)
