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
from ideogram4_quant.tests.host.locate import PACK, Host
from ideogram4_quant.tests.host.pocket_variant import BY_LEVEL, pocket_variant, set_values, value
from ideogram4_quant.tests.host.server import Server
from ideogram4_quant.tests.host.workflow_page import as_api, drop, look, open_page, setting
from ideogram4_quant.tests.host.workflows import EXAMPLE
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
BOXES = """
JSON.stringify(Object.fromEntries(app.graph.nodes.map(node =>
  [node.type, node.widgets?.find(w => w.name === 'shown')?.value ?? null])))
"""
LOOKS = pytest.mark.parametrize("nodes_2", [False, True], ids=["default look", "Nodes 2.0"])

PAINTING = [file for file in FILES if "SaveImage" in file.read_text(encoding="utf-8")]
PLAIN = next(file for file in FILES if file.stem.endswith("text to image"))
TRY_IT = next(file for file in FILES if "try it now" in file.stem)


def named_files() -> set[tuple[str, str]]:
    """(folder, name) of every file that a workflow names."""
    named = set()
    for node in (node for file in FILES for node in load(file)["nodes"]):
        named |= {(m["directory"], m["name"]) for m in node["properties"].get("models", [])}
        if node["type"] in FOLDER_OF and "pocket/" not in node["widgets_values"][0]:
            named.add((FOLDER_OF[node["type"]], node["widgets_values"][0]))
    return named


@pytest.fixture(scope="module")
def page(server: Server, models: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    save_file(fused(update(1)), models / "loras" / LORA)
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(server.base / "input" / EXAMPLE)
    placeholders = [models / folder / name for folder, name in named_files()]
    for path in placeholders:
        path.touch(exist_ok=False)
    try:
        yield request.getfixturevalue("browser")  # opened now that the files are there
    finally:
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


@LOOKS
@every_file
def test_dropped_on_the_page_it_loads_without_an_error(file, page, nodes_2):
    look(page, nodes_2=nodes_2)
    drop_on_empty(page, file.name, load(file))
    assert found_errors(page) == ""
    assert json.loads(page.run(OVERLAPS)) == []
    assert page.errors == []


def test_every_workflow_is_served_as_a_template(server):
    names = server.get("/workflow_templates")
    (served,) = [found for found in names.values() if set(found) & {p.stem for p in FILES}]
    assert sorted(served) == [path.stem for path in FILES]


def test_the_blueprint_is_in_the_node_library(server):
    (file,) = (PACK / "subgraphs").glob("*.json")
    offered = {
        entry["name"]: (key, entry) for key, entry in server.get("/global_subgraphs").items()
    }
    key, entry = offered[file.stem]
    assert entry["source"] == "custom_node"
    assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == load(file)


def painted(page: Browser) -> list[dict]:
    """Presses Run and waits for the picture that is shown on Save Image."""
    page.run("app.nodeOutputs = {}")
    page.run("(async () => { await app.queuePrompt(0, 1); })()")
    return json.loads(page.wait_for(SHOWN, 300))


def test_the_pocket_model_paints_as_shipped_and_a_fresh_page_shows_what_was_said(page, server):
    """In the default look, with the preview while it runs; the second page's run is cached."""
    look(page, nodes_2=False)
    setting(page, "Comfy.Execution.PreviewMethod", "latent2rgb")
    drop_on_empty(page, TRY_IT.name, load(TRY_IT))
    (shown, *_) = painted(page)
    assert Image.open(io.BytesIO(server.fetch(shown))).size == (128, 64)
    assert json.loads(page.run(OVERLAPS)) == []
    said = json.loads(page.run(BOXES))
    assert "pocket/" in said["Ideogram4QuantLoad"]
    assert "128x64" in said["Ideogram4QuantSampler"]
    assert "128 x 64 px" in said["Ideogram4QuantCaption"]
    fresh = Browser(find_browser())
    try:
        open_page(fresh, server.url, nodes_2=False)
        drop(fresh, TRY_IT.name, load(TRY_IT))
        painted(fresh)
        fresh.wait_for("!!app.graph.nodes.find(n => n.type === 'Ideogram4QuantLoad')"
                       ".widgets.find(w => w.name === 'shown').value", 30)  # fmt: skip
        assert json.loads(fresh.run(BOXES)) == said
    finally:
        fresh.close()


def test_a_level_that_is_picked_goes_before_the_files_of_the_workflow(page):
    drop_on_empty(page, PLAIN.name, load(PLAIN))
    node = "app.graph.nodes.find(n => n.type === 'Ideogram4QuantLoad')"
    names = f"{node}.widgets.filter(w => /^(un)?conditional_file$/.test(w.name)).map(w => w.value)"
    names = f"JSON.stringify({names})"
    assert all(name.endswith(".safetensors") for name in json.loads(page.run(names)))
    page.run(
        f"(() => {{ const w = {node}.widgets.find(w => w.name === 'level');"
        " w.value = 'Q4_K'; w.callback('Q4_K'); })()"
    )
    assert json.loads(page.run(names)) == ["by level", "by level"]


@pytest.mark.slow
@pytest.mark.parametrize("file", PAINTING, ids=lambda file: file.stem)
def test_workflow_runs_and_shows_its_picture(page, server, file):
    workflow = pocket_variant(load(file), lora=LORA, preset="turbo")
    drop_on_empty(page, file.name, workflow)
    picture = Image.open(io.BytesIO(server.fetch(painted(page)[0])))
    assert picture.size == (128, 64)
    assert np.asarray(picture).std() > 1
    assert found_errors(page) == ""
    assert page.errors == []


def test_quantize_workflow_makes_the_file_of_each_copy(page, server, models):
    (file,) = [file for file in FILES if file.stem.endswith("quantize your own")]
    workflow = load(file)
    (node,) = of_type(workflow, "Ideogram4QuantQuantize")
    assert "unconditional" in value(node, "pair")
    assert "unconditional" not in value(node, "source")
    set_values(node, source=graphs.CONDITIONAL, pair=graphs.UNCONDITIONAL)
    node["properties"].pop("models")
    drop_on_empty(page, file.name, workflow)
    assert found_errors(page) == ""
    run = server.run(as_api(page))
    assert run.status == "success", run.error
    (report,) = [out["text"][0] for out in run.outputs.values() if "text" in out]
    for source in (graphs.CONDITIONAL, graphs.UNCONDITIONAL):
        made = [p for p in (models / "diffusion_models").glob("*INT8_W8A8_rotated*")
                if p.name.startswith(source.removesuffix("_bf16.safetensors"))]  # fmt: skip
        assert made, source
        for path in made:
            assert str(path) in report
    for path in (models / "diffusion_models").glob("ideogram4_pocket*INT8_W8A8_rotated*"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["INT8 W8A8", "Q8_0", "Q4_K"])
def test_word_typed_on_the_page_can_be_read_in_the_picture(page, server, level):
    pytest.importorskip("rapidocr")
    from ideogram4_quant.engine.ocr import WordReader

    prompt = HELD_OUT[0]
    workflow = pocket_variant(load(PLAIN), prompt, seed=prompt.seed)
    (loader,) = of_type(workflow, "Ideogram4QuantLoad")
    set_values(loader, level=level, conditional_file=BY_LEVEL, unconditional_file=BY_LEVEL)
    drop_on_empty(page, PLAIN.name, workflow)
    picture = Image.open(io.BytesIO(server.fetch(painted(page)[0])))
    assert WordReader().read(picture) == prompt.word


# From here on the page goes on saying that something is missing.


def test_page_marks_a_file_that_is_missing_and_a_node_that_is_not_installed(page):
    missing, unknown = load(PLAIN), load(PLAIN)
    drop_on_empty(page, "complete.json", load(PLAIN))
    assert found_errors(page) == ""
    (vae,) = of_type(missing, "VAELoader")
    set_values(vae, vae_name="no-such-file.safetensors")
    vae["properties"].pop("models", None)
    drop_on_empty(page, "missing.json", missing)
    assert found_errors(page) != ""
    unknown["nodes"][-1]["type"] = "NoSuchNodeAnywhere"
    drop_on_empty(page, "unknown.json", unknown)
    assert "NoSuchNodeAnywhere" in found_errors(page)


def test_the_page_offers_every_missing_file_for_download(page):
    text = PLAIN.read_text(encoding="utf-8")
    models = [m for n in load(PLAIN)["nodes"] for m in n["properties"].get("models", [])]
    assert len(models) == 4
    for model in models:
        text = text.replace(model["name"], f"absent-{model['name']}")
    look(page, nodes_2=False)
    drop_on_empty(page, "absent.json", json.loads(text))
    page.wait_for(
        "(b => { b?.click(); return !!b; })([...document.querySelectorAll('button')]"
        ".find(b => b.innerText.trim() === 'View details'))"
    )
    page.wait_for("document.body.innerText.includes('Download all')")
    shown = page.run("document.body.innerText").replace("\n", "")
    for model in models:
        assert f"absent-{model['name']}" in shown
    buttons = "[...document.querySelectorAll('button')].map(b => b.innerText.trim())"
    assert page.run(f"{buttons}.filter(text => text === 'Download').length") == len(models)


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
        for key, given in node["inputs"].items():
            if isinstance(given, list) and str(given[0]) in replaced:
                node["inputs"][key] = replaced[str(given[0])]
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
