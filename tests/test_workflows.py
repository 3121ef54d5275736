"""The workflows that come with the pack: their files, and what ComfyUI's own page makes of them."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.checkpoint.levels import AUTO, LEVELS
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.tests.host.browser import Browser, find_browser
from ideogram4_quant.tests.host.locate import PACK, Host
from ideogram4_quant.tests.host.server import Server, make_base
from ideogram4_quant.tests.host.workflow_page import drop, open_page
from ideogram4_quant.tests.test_host_browser import pocket_variant

FILES = sorted((PACK / "workflows").glob("*.json"))
TITLE_BAR = 30
ERRORS = r"document.body.innerText.match(/\d+ errors? found|missing/i)?.[0] ?? ''"
LORA, PICTURE = "my-lora.safetensors", "start.png"
FOLDER_OF = {"Ideogram4QuantLoadEncoder": "text_encoders", "VAELoader": "vae"}

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def load(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def box(node: dict) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) with the title bar, which lies above a node's position."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


def group_box(group: dict) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: tuple, b: tuple) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def of_type(workflow: dict, kind: str) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind]


def test_every_workflow_is_here():
    stems = " ".join(file.stem for file in FILES)
    assert len(FILES) >= 6
    for words in ("INT8", "Q8_0", "Q4_K", "low VRAM", "LoRA", "image to image"):
        assert words in stems
    assert len({load(file)["id"] for file in FILES}) == len(FILES)


@every_file
def test_nothing_overlaps_and_every_node_lies_in_one_group(file):
    workflow = load(file)
    groups = [group_box(group) for group in workflow["groups"]]
    for one, other in itertools.combinations(workflow["nodes"], 2):
        assert not overlap(box(one), box(other)), (one["type"], other["type"])
    for one, other in itertools.combinations(groups, 2):
        assert not overlap(one, other)
    for node in workflow["nodes"]:
        assert sum(inside(box(node), group) for group in groups) == 1, node["type"]
    assert all(group["title"].strip() for group in workflow["groups"])


@every_file
def test_links_agree_with_the_sockets_they_join(file):
    workflow = load(file)
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    for number, source, output, target, place, _ in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
    used = {i["link"] for n in workflow["nodes"] for i in n["inputs"]} - {None}
    assert used == {link[0] for link in workflow["links"]}


@every_file
def test_downloads_are_named_where_the_page_and_the_reader_look(file):
    workflow = load(file)
    notes = "\n".join(n["widgets_values"][0] for n in of_type(workflow, "MarkdownNote"))
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
            assert not model["name"].endswith(".gguf"), "the page hides these links"
            assert model["url"] in notes
    (loader,) = of_type(workflow, "Ideogram4QuantLoad")
    assert loader["widgets_values"][0] in (AUTO, *LEVELS)
    (vae,) = of_type(workflow, "VAELoader")
    (encoder,) = of_type(workflow, "Ideogram4QuantLoadEncoder")
    for node in (vae, encoder):
        assert node["widgets_values"][0] in notes
    for folder in ("models/diffusion_models", "models/text_encoders", "models/vae"):
        assert folder in notes


@every_file
def test_thumbnail_is_a_small_jpeg(file):
    picture = file.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert np.asarray(image).std() > 1


# In the page of a real ComfyUI that has every file the workflows name; empty ones will do.


def write_named_files(base: Path) -> None:
    """Empty files under every name in the workflows, and one for the reader's own LoRA."""
    named = {("loras", LORA)}
    for node in (node for file in FILES for node in load(file)["nodes"]):
        named |= {(m["directory"], m["name"]) for m in node["properties"].get("models", [])}
        if node["type"] in FOLDER_OF:
            named.add((FOLDER_OF[node["type"]], node["widgets_values"][0]))
    for folder, name in named:
        (base / "models" / folder / name).touch()
    Image.effect_mandelbrot((64, 64), (-2.2, -1.4, 0.8, 1.4), 20).save(base / "input" / PICTURE)


@pytest.fixture(scope="module")
def page(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found (set CHROMIUM)")
    base = make_base(tmp_path_factory.mktemp("workflows"))
    write_named_files(base)
    server = Server(host, base)
    browser = Browser(program)
    open_page(browser, server.url)
    yield browser
    browser.close()
    server.close()


def drop_on_empty(page: Browser, name: str, workflow: dict) -> None:
    page.run("app.graph.clear()")
    drop(page, name, workflow)


def prepared(workflow: dict) -> dict:
    """The workflow with the files picked that every user picks for himself."""
    for node in of_type(workflow, "LoadImage"):
        node["widgets_values"][0] = PICTURE
        node.get("widgets_values_named", {})["image"] = PICTURE
    for node in of_type(workflow, "Ideogram4QuantLoadLora"):
        node["widgets_values"][0] = LORA
        node.get("widgets_values_named", {})["lora"] = LORA
    return workflow


def found_errors(page: Browser) -> str:
    """What the page says is wrong with its graph; empty where it says nothing."""
    time.sleep(1)
    marked = page.run(
        "app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])"
        ".map(n => n.type).join(', ')"
    )
    return marked or page.run(ERRORS)


@pytest.mark.host
@every_file
def test_dropped_on_the_page_it_loads_without_an_error(file, page):
    drop_on_empty(page, file.name, prepared(load(file)))
    assert found_errors(page) == ""
    assert page.errors == []


@pytest.mark.host
def test_page_marks_a_file_that_is_missing_and_a_node_that_is_not_installed(page):
    missing, unknown = prepared(load(FILES[0])), prepared(load(FILES[0]))
    drop_on_empty(page, "complete.json", prepared(load(FILES[0])))
    assert found_errors(page) == ""
    (vae,) = of_type(missing, "VAELoader")
    vae["widgets_values"] = ["no-such-file.safetensors"]
    vae["widgets_values_named"] = {"vae_name": "no-such-file.safetensors"}
    vae["properties"].pop("models", None)
    drop_on_empty(page, "missing.json", missing)
    assert found_errors(page) != ""
    unknown["nodes"][-1]["type"] = "NoSuchNodeAnywhere"
    drop_on_empty(page, "unknown.json", unknown)
    assert "NoSuchNodeAnywhere" in found_errors(page)


TYPE_CAPTION = """
(([caption, seed]) => {
  const find = type => app.graph.nodes.find(node => node.type === type);
  const set = (node, name, value) => { node.widgets.find(w => w.name === name).value = value; };
  const check = find('Ideogram4QuantCheckCaption'), sampler = find('Ideogram4QuantSampler');
  check.disconnectInput(check.inputs.findIndex(input => input.name === 'caption'));
  set(check, 'caption', caption);
  set(sampler, 'preset', 'default');
  set(sampler, 'seed', seed);
})
"""


@pytest.fixture(scope="module")
def pocket_page(server: Server) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found (set CHROMIUM)")
    browser = Browser(program)
    open_page(browser, server.url)
    yield browser
    browser.close()


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("level", ["INT8", "Q8_0", "Q4_K"])
def test_word_typed_on_the_page_can_be_read_in_the_picture(pocket_page, server, level):
    pytest.importorskip("rapidocr")
    from ideogram4_quant.engine.ocr import WordReader

    (file,) = [file for file in FILES if file.stem.endswith(f"text to image {level}")]
    drop_on_empty(pocket_page, file.name, pocket_variant(load(file)))
    prompt = HELD_OUT[0]
    pocket_page.run(f"{TYPE_CAPTION}({json.dumps([prompt.caption, prompt.seed])})")
    before = set(server.get("/history"))
    pocket_page.run("app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 300
    while not (new := set(server.get("/history")) - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    run = server.wait(new.pop())
    assert run.status == "success", run.error
    images = [image for out in run.outputs.values() for image in out.get("images", [])]
    picture = Image.open(io.BytesIO(server.fetch(images[-1])))
    assert WordReader().read(picture) == prompt.word
