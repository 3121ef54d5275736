"""The workflows in a real browser: dropped, complete, run on the pocket model, picture shown."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.browser import Browser, find_browser
from ideogram4_quant.tests.host.locate import PACK
from ideogram4_quant.tests.host.workflow_page import drop, open_page
from ideogram4_quant.tests.host.workflow_specs import EXAMPLE, PLACEHOLDERS
from ideogram4_quant.tests.test_host_lora import fused, update

pytestmark = [pytest.mark.host, pytest.mark.slow]
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
_RUN = "(async () => { await app.queuePrompt(0, 1); })()"
_SHOWN = """
(() => {
  const node = app.graph.nodes.find(n => n.type === 'SaveImage');
  const images = app.nodeOutputs[node.id]?.images;
  return images ? JSON.stringify(images) : '';
})()
"""
_BAD_NODES = """
JSON.stringify(app.graph.nodes
  .filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).map(n => n.type))
"""
_OVERLAPS = """
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


@pytest.fixture(scope="module")
def page(server, models) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium found (set CHROMIUM)")
    save_file(fused(update(1)), models / "loras" / "fused.safetensors")
    for kind, name in PLACEHOLDERS.items():
        (models / kind / name).touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    for name in ("start.png", EXAMPLE):
        Image.fromarray(noise).save(server.base / "input" / name)
    browser = Browser(program)
    open_page(browser, server.url)
    yield browser
    browser.close()


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
            values[0] = "fused.safetensors"
        elif node["type"] == "LoadImage":
            values[0] = "start.png"
        elif node["type"] == "Ideogram4QuantSampler":
            preset, seed, after, width, height = 0, 1, 2, 3, 4
            values[preset], values[seed], values[after] = "turbo", 1, "fixed"
            values[width], values[height] = 128, 64
        node.pop("widgets_values_named", None)
    return changed


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_dropped_workflow_is_complete_and_laid_out(page, path: Path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    drop(page, path.name, workflow)
    assert json.loads(page.run(_BAD_NODES)) == []
    assert json.loads(page.run(_OVERLAPS)) == []
    assert path.with_suffix(".jpg").is_file()
    assert page.errors == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_and_shows_its_picture(page, server, path: Path):
    drop(page, path.name, pocket_variant(json.loads(path.read_text(encoding="utf-8"))))
    page.run("app.nodeOutputs = {}")
    page.run(_RUN)
    shown = json.loads(page.wait_for(_SHOWN, 300))
    picture = Image.open(io.BytesIO(server.fetch(shown[0])))
    assert picture.size == (128, 64)
    assert np.asarray(picture).std() > 1
    assert json.loads(page.run(_BAD_NODES)) == []
    assert page.errors == []


def test_every_workflow_is_served_as_a_template(server):
    names = server.get("/workflow_templates")
    (served,) = [found for found in names.values() if set(found) & {p.stem for p in WORKFLOWS}]
    assert sorted(served) == [path.stem for path in WORKFLOWS]
