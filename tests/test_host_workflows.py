"""The workflows that come with the pack in the page of a real ComfyUI.

It has every file that they name (empty ones will do) and the pocket model.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.browser import Browser, find_browser
from ideogram4_quant.tests.host.locate import Host
from ideogram4_quant.tests.host.server import Server
from ideogram4_quant.tests.host.workflow_page import as_api, drop, open_page
from ideogram4_quant.tests.host.workflow_specs import EXAMPLE
from ideogram4_quant.tests.test_host_lora import fused, update
from ideogram4_quant.tests.workflow_files import FILES, every_file, load, of_type

pytestmark = pytest.mark.host
ERRORS = r"document.body.innerText.match(/\d+ errors? found|missing/i)?.[0] ?? ''"
LORA = "fused.safetensors"
FOLDER_OF = {"Ideogram4QuantLoadEncoder": "text_encoders", "VAELoader": "vae"}

SHOWN = """
(() => {
  const node = app.graph.nodes.find(n => n.type === 'SaveImage');
  const images = app.nodeOutputs[node.id]?.images;
  return images ? JSON.stringify(images) : '';
})()
"""
OVERLAPS = """
(() => {
  const TITLE = 30;
  const boxes = app.graph.nodes.map(({ title, pos, size }) => ({
    title, left: pos[0], top: pos[1] - TITLE, right: pos[0] + size[0], bottom: pos[1] + size[1],
  }));
  const beside = (p, q) => p.left < q.right && q.left < p.right;
  const hit = (p, q) => beside(p, q) && p.top < q.bottom && q.top < p.bottom;
  const pairs = boxes.flatMap((p, i) => boxes.slice(i + 1).filter(q => hit(p, q)).map(q => [p, q]));
  return JSON.stringify(pairs.map(pair => pair.map(box => box.title)));
})()
"""
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

PAINTING = [file for file in FILES if "SaveImage" in file.read_text(encoding="utf-8")]


def named_files() -> set[tuple[str, str]]:
    """(folder, name) of every file that a workflow names."""
    named = set()
    for node in (node for file in FILES for node in load(file)["nodes"]):
        named |= {(m["directory"], m["name"]) for m in node["properties"].get("models", [])}
        if node["type"] in FOLDER_OF:
            named.add((FOLDER_OF[node["type"]], node["widgets_values"][0]))
    return named


@pytest.fixture(scope="module")
def page(server: Server, models: Path) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found (set CHROMIUM)")
    save_file(fused(update(1)), models / "loras" / LORA)
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(server.base / "input" / EXAMPLE)
    placeholders = [models / folder / name for folder, name in named_files()]
    for path in placeholders:
        path.touch(exist_ok=False)
    browser = Browser(program)
    open_page(browser, server.url)
    yield browser
    browser.close()
    for path in placeholders:
        path.unlink()


def drop_on_empty(page: Browser, name: str, workflow: dict) -> None:
    page.run("app.graph.clear()")
    drop(page, name, workflow)


def found_errors(page: Browser) -> str:
    """What the page says is wrong with its graph; empty where it says nothing."""
    time.sleep(1)
    marked = page.run(
        "app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])"
        ".map(n => n.type).join(', ')"
    )
    return marked or page.run(ERRORS)


@every_file
def test_dropped_on_the_page_it_loads_without_an_error(file, page):
    drop_on_empty(page, file.name, load(file))
    assert found_errors(page) == ""
    assert json.loads(page.run(OVERLAPS)) == []
    assert page.errors == []


def test_every_workflow_is_served_as_a_template(server):
    names = server.get("/workflow_templates")
    (served,) = [found for found in names.values() if set(found) & {p.stem for p in FILES}]
    assert sorted(served) == [path.stem for path in FILES]


def pocket_variant(workflow: dict) -> dict:
    """The workflow with the pocket model's files, few steps and a small picture."""
    changed = json.loads(json.dumps(workflow))
    for node in changed["nodes"]:
        values = node.get("widgets_values")
        if node["type"] == "Ideogram4QuantLoad":
            values[0] = values[0].removesuffix(" rotated")
        elif node["type"] == "Ideogram4QuantLoadEncoder":
            values[0] = graphs.ENCODER
        elif node["type"] == "VAELoader":
            node |= {"type": "Ideogram4QuantLoadVAE", "widgets_values": [graphs.VAE]}
            node["inputs"][0] |= {"name": "vae", "widget": {"name": "vae"}}
        elif node["type"] == "Ideogram4QuantLoadLora":
            values[0] = LORA
        elif node["type"] == "Ideogram4QuantSampler":
            preset, seed, after, width, height = 0, 1, 2, 3, 4
            values[preset], values[seed], values[after] = "turbo", 1, "fixed"
            values[width], values[height] = 128, 64
        node.pop("widgets_values_named", None)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("file", PAINTING, ids=lambda file: file.stem)
def test_workflow_runs_and_shows_its_picture(page, server, file):
    drop_on_empty(page, file.name, pocket_variant(load(file)))
    page.run("app.nodeOutputs = {}")
    page.run("(async () => { await app.queuePrompt(0, 1); })()")
    shown = json.loads(page.wait_for(SHOWN, 300))
    picture = Image.open(io.BytesIO(server.fetch(shown[0])))
    assert picture.size == (128, 64)
    assert np.asarray(picture).std() > 1
    assert found_errors(page) == ""
    assert page.errors == []


def test_quantize_workflow_makes_the_file_of_each_copy(page, server, models):
    (file,) = [file for file in FILES if file.stem.endswith("quantize your own")]
    workflow = load(file)
    sources = {"conditional": graphs.CONDITIONAL, "unconditional": graphs.UNCONDITIONAL}
    for node in of_type(workflow, "Ideogram4QuantQuantize"):
        source, _, copy = node["widgets_values"][:3]
        assert ("unconditional" in source) == (copy == "unconditional")
        node["widgets_values"][0] = sources[copy]
        node.pop("widgets_values_named", None)
        node["properties"].pop("models")
    drop_on_empty(page, file.name, workflow)
    assert found_errors(page) == ""
    run = server.run(as_api(page))
    assert run.status == "success", run.error
    reports = [out["text"][0] for out in run.outputs.values() if "text" in out]
    for copy in sources:
        out = models / "diffusion_models" / f"ideogram4-{copy}-INT8_W8A8_rotated.safetensors"
        assert out.is_file()
        assert any(str(out) in report for report in reports)
        out.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["INT8", "Q8_0", "Q4_K"])
def test_word_typed_on_the_page_can_be_read_in_the_picture(page, server, level):
    pytest.importorskip("rapidocr")
    from ideogram4_quant.engine.ocr import WordReader

    (file,) = [file for file in FILES if file.stem.endswith(f"text to image {level}")]
    drop_on_empty(page, file.name, pocket_variant(load(file)))
    prompt = HELD_OUT[0]
    page.run(f"{TYPE_CAPTION}({json.dumps([prompt.caption, prompt.seed])})")
    page.run("app.nodeOutputs = {}")
    page.run("(async () => { await app.queuePrompt(0, 1); })()")
    shown = json.loads(page.wait_for(SHOWN, 300))
    picture = Image.open(io.BytesIO(server.fetch(shown[0])))
    assert WordReader().read(picture) == prompt.word


# From here on the page goes on saying that something is missing.


def test_page_marks_a_file_that_is_missing_and_a_node_that_is_not_installed(page):
    missing, unknown = load(FILES[0]), load(FILES[0])
    drop_on_empty(page, "complete.json", load(FILES[0]))
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


# ComfyUI's own templates of Ideogram 4, with this pack's loaders in place of the stock ones.


def official_template(host: Host, name: str) -> dict:
    """A workflow of the package comfyui-workflow-templates in the host's Python."""
    pattern = f"*/site-packages/comfyui_workflow_templates*/templates/{name}.json"
    places = [host.python.parent.parent / "lib", host.python.parent.parent / "Lib"]
    found = [path for place in places for path in place.glob(pattern)]
    found += [path for place in places for path in place.glob(pattern.removeprefix("*/"))]
    if not found:
        pytest.skip(f"the host has no template {name}")
    return load(found[0])


def on_our_loaders(graph: dict, level: str) -> dict:
    """A graph whose stock loaders are replaced by ours; small, and with few steps."""
    replaced = {}
    for name, node in graph.items():
        if node["class_type"] == "UNETLoader":
            replaced[name] = ["model", int("unconditional" in node["inputs"]["unet_name"])]
        elif node["class_type"] in ("CLIPLoader", "VAELoader"):
            replaced[name] = [{"CLIPLoader": "encoder", "VAELoader": "vae"}[node["class_type"]], 0]
    loaders = {name: graphs.parts(level=level)[name] for name in ("model", "encoder", "vae")}
    kept = {name: node for name, node in graph.items() if name not in replaced}
    for node in kept.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and str(value[0]) in replaced:
                node["inputs"][key] = replaced[str(value[0])]
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = 256
        elif node["class_type"] == "CustomCombo":
            node["inputs"]["choice"] = "Turbo"
        elif node["class_type"] == "CLIPTextEncode":  # theirs is long for the pocket's tokenizer
            node["inputs"]["text"] = graphs.CAPTION
    assert len(replaced) == 4
    return kept | loaders


@pytest.mark.parametrize(
    ("name", "level"),
    [("image_ideogram4_t2i", "BF16"), ("image_ideogram4_t2i_int8", "INT8 W8A8")],
)
def test_official_template_runs_on_our_loaders(page, server, host, name, level):
    drop_on_empty(page, f"{name}.json", official_template(host, name))
    run = server.run(on_our_loaders(as_api(page), level))
    assert run.status == "success", run.error
    (image,) = [i for out in run.outputs.values() for i in out.get("images", [])]
    picture = Image.open(io.BytesIO(server.fetch(image)))
    assert picture.size == (256, 256)
    assert np.asarray(picture).std() > 1
