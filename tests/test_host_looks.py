"""What the page shows in each look: settings behind a button, and the blueprint at work."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.tests.host.browser import Browser
from ideogram4_quant.tests.host.locate import PACK
from ideogram4_quant.tests.host.pocket_variant import pocket_variant
from ideogram4_quant.tests.host.workflow_page import as_api, drop, look, setting
from ideogram4_quant.tests.workflow_files import load

pytestmark = pytest.mark.host
LOOKS = pytest.mark.parametrize("nodes_2", [False, True], ids=["default look", "Nodes 2.0"])
ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets"
SAMPLER = "app.graph.nodes.find(n => n.type === 'Ideogram4QuantSampler')"
NAMES = "map(w => w.name)"
DRAWN = f"JSON.stringify({SAMPLER}.widgets.filter(w => {SAMPLER}.isWidgetVisible(w)).{NAMES})"
PLACED = f"JSON.stringify({SAMPLER}.getLayoutWidgets().{NAMES})"
PRESS = f"{SAMPLER}.widgets.find(w => w.name === 'advanced').callback()"
HEIGHT = f"{SAMPLER}.size[1]"
ADD = """
(async () => {
  app.graph.clear();
  const node = LiteGraph.createNode('Ideogram4QuantSampler');
  app.graph.add(node);
  node.setSize([340, 700]);
})()
"""
SAVE = """
(() => {
  const [blueprint] = app.graph.nodes, save = LiteGraph.createNode('SaveImage');
  app.graph.add(save);
  blueprint.connect(0, save, 0);
})()
"""


@pytest.fixture
def default_look(browser) -> Browser:
    look(browser, nodes_2=False)
    browser.run(ADD)
    return browser


def drawn(page: Browser) -> set[str]:
    """Names of the sampler's widgets in the default look, each with a place of its own."""
    names = json.loads(page.run(DRAWN))
    assert json.loads(page.run(PLACED)) == names
    return set(names)


def test_advanced_settings_lie_behind_a_button_in_the_default_look(default_look):
    page, always_there = default_look, {"preset", "seed", "width", "denoise", "advanced", "shown"}
    folded, height = drawn(page), page.run(HEIGHT)
    assert always_there <= folded
    assert not folded & {"steps", "sampler_name", "residency", "details"}
    page.run(PRESS)
    assert drawn(page) >= folded | {"steps", "sampler_name", "residency", "details"}
    assert page.run(HEIGHT) > height
    page.run(PRESS)
    assert (drawn(page), page.run(HEIGHT)) == (folded, height)


def test_what_is_folded_away_is_queued_and_saved_all_the_same(default_look):
    page = default_look
    saved = f"JSON.stringify({SAMPLER}.serialize().widgets_values)"
    folded = as_api(page), page.run(saved)
    page.run(PRESS)
    assert (as_api(page), page.run(saved)) == folded
    (node,) = folded[0].values()
    assert node["inputs"]["steps"] == 0
    assert "advanced" not in node["inputs"]
    assert None not in json.loads(folded[1])


def test_a_setting_that_is_connected_is_not_folded_away(default_look):
    page = default_look
    page.run(
        "(() => { const n = LiteGraph.createNode('PrimitiveInt'); app.graph.add(n);"
        f" n.connect(0, {SAMPLER}, {SAMPLER}.inputs.findIndex(i => i.name === 'steps')); }})()"
    )
    assert "steps" in drawn(page)
    assert "residency" not in drawn(page)


def test_the_page_s_setting_shows_all(default_look):
    page = default_look
    setting(page, ALWAYS, True)
    try:
        assert {"steps", "residency"} <= drawn(page)
    finally:
        setting(page, ALWAYS, False)
    assert "steps" not in drawn(page)


def test_nodes_2_has_its_own_button_alone(browser):
    look(browser, nodes_2=True)
    browser.run(ADD)
    buttons = "[...document.querySelectorAll('button')].filter(b => /advanced/i.test(b.innerText))"
    assert browser.wait_for(f"{buttons}.length") == 1
    assert browser.wait_for("document.querySelectorAll('textarea').length") == 1  # the report
    assert browser.errors == []


@LOOKS
def test_the_blueprint_paints(browser, server, nodes_2):
    """On the pocket model's files, from a caption to a saved picture."""
    look(browser, nodes_2=nodes_2)
    (file,) = (PACK / "subgraphs").glob("*.json")
    blueprint = load(file)
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    subgraph["nodes"] = pocket_variant({"nodes": subgraph["nodes"]}, preset="turbo")["nodes"]
    browser.run("app.graph.clear()")
    drop(browser, file.name, blueprint)
    widgets = "JSON.stringify(app.graph.nodes[0].widgets.map(w => w.name))"
    assert json.loads(browser.run(widgets)) == [
        "caption",
        "aspect_ratio",
        "level",
        "preset",
        "seed",
    ]
    browser.run(SAVE)
    run = server.run(as_api(browser))
    assert run.status == "success", run.error
    (image,) = [i for out in run.outputs.values() for i in out.get("images", [])]
    picture = Image.open(io.BytesIO(server.fetch(image)))
    assert np.asarray(picture).std() > 1
    assert browser.errors == []
