"""ComfyUI's page in a browser: waiting for it, dropping a workflow on it, looking at it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from .browser import Browser

_READY = (
    "!!(window.app?.graph && window.app.extensionManager && window.app.vueAppReady"
    " && window.LiteGraph?.registered_node_types['Ideogram4QuantLoad'])"
)
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
_DRAWINGS = 20
# A drop as the mouse would make it: the file lies in the event's data.
_DROP = """
async ([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([text], name, { type: 'application/json' }));
  const canvas = document.querySelector('#graph-canvas');
  for (const kind of ['dragenter', 'dragover', 'drop'])
    canvas.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true }));
}
"""
_FIT = """
(() => {
  const nodes = app.graph.nodes.concat(app.graph.groups);
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  const view = app.canvas.canvas.getBoundingClientRect();
  const scale = Math.min((view.width - 120) / (right - left), (view.height - 170) / (bottom - top));
  app.canvas.ds.scale = Math.min(scale, 1);
  app.canvas.ds.offset[0] = 90 / app.canvas.ds.scale - left;
  app.canvas.ds.offset[1] = 110 / app.canvas.ds.scale - top;
  app.canvas.setDirty(true, true);
})()
"""


def open_page(page: Browser, url: str, *, nodes_2: bool = True) -> None:
    """The empty graph of a server, in Nodes 2.0 or in the default look; the greeting of a first
    visit is put away."""
    page.open(url)
    page.wait_for(_READY)
    for name, value in _SETTINGS.items():
        setting(page, name, value)
    look(page, nodes_2=nodes_2)
    page.wait_for("document.readyState === 'complete'")
    time.sleep(1)
    close_dialogs(page)
    page.run("app.graph.clear()")


def setting(page: Browser, name: str, value: object) -> None:
    """Sets one of the page's settings."""
    page.run(f"app.extensionManager.setting.set({json.dumps(name)}, {json.dumps(value)})")


def look(page: Browser, *, nodes_2: bool) -> None:
    """Nodes 2.0, or the default look."""
    setting(page, "Comfy.VueNodes.Enabled", nodes_2)


def close_dialogs(page: Browser) -> None:
    """Closes what lies over the graph."""
    for _ in range(3):
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Escape", windowsVirtualKeyCode=27)
        time.sleep(0.3)


def drop(page: Browser, name: str, workflow: dict) -> None:
    """Drops a workflow file on the graph and waits until it is there."""
    arguments = json.dumps([name, json.dumps(workflow)])
    page.run(f"({_DROP})({arguments})")
    page.wait_for(f"app.graph.nodes.length === {len(workflow['nodes'])}")
    time.sleep(0.5)


def as_api(page: Browser) -> dict:
    """The graph on the page as the page would queue it: subgraphs opened up, in API format."""
    queued = "(async () => JSON.stringify((await app.graphToPrompt()).output))()"
    return json.loads(page.run(queued))


def fit(page: Browser) -> None:
    """The whole graph in view."""
    page.run(_FIT)


def show(page: Browser, path: Path) -> None:
    """A picture of the whole graph, as soon as the page draws it twice the same."""
    close_dialogs(page)
    fit(page)
    quality = 80 if path.suffix == ".jpg" else None
    width, height = json.loads(page.run("JSON.stringify([innerWidth, innerHeight])"))
    clip, before = {"x": 60, "y": 40, "width": width - 60, "height": height - 50}, None
    for _ in range(_DRAWINGS):
        time.sleep(1)
        page.screenshot(path, quality=quality, clip=clip)
        if path.read_bytes() == before:
            return
        before = path.read_bytes()
