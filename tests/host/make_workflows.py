"""Builds workflows/*.json and their pictures in ComfyUI's own interface.

``python -m ideogram4_quant.tests.host.make_workflows [TITLE ...]``: the interface makes the nodes
and writes the files, so that they are what a user's own export would be.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .browser import Browser, find_browser
from .locate import PACK, find_host
from .server import Server, make_base
from .workflow_page import fit, open_page, show
from .workflow_specs import EXAMPLE, PLACEHOLDERS, WORKFLOWS, Column, Workflow

_BUILD = (Path(__file__).parent / "build_workflow.js").read_text(encoding="utf-8")
_SEPARATORS = (",", ": ")


def build(page: Browser, workflow: Workflow) -> str:
    """The workflow as the interface serializes it."""
    columns = [_plain(column) for column in workflow.columns]
    arguments = json.dumps([columns, [list(link) for link in workflow.links]])
    page.run(f"({_BUILD})(...{arguments})")
    fit(page)  # a user's page opens with this view
    return page.run("JSON.stringify(app.graph.serialize())")


def _plain(column: Column) -> dict:
    nodes = [node.__dict__ for node in column.nodes]
    return {"title": column.title, "color": column.color, "width": column.width, "nodes": nodes}


def main(titles: Sequence[str] = ()) -> int:
    host, program = find_host(), find_browser()
    if isinstance(host, str) or program is None:
        print(host if isinstance(host, str) else "no Chromium found (set CHROMIUM)")
        return 1
    folder = PACK / "workflows"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        for kind, name in PLACEHOLDERS:
            (Path(base) / "models" / kind / name).touch()
        Image.effect_mandelbrot((512, 512), (-2.2, -1.4, 0.8, 1.4), 60).save(
            Path(base) / "input" / EXAMPLE
        )
        server = Server(host, Path(base))
        try:
            for workflow in (w for w in WORKFLOWS if not titles or w.title in titles):
                page = Browser(program)
                open_page(page, server.url)
                data = json.loads(build(page, workflow))
                data["id"] = workflow.id
                text = json.dumps(data, indent=1, ensure_ascii=False, separators=_SEPARATORS)
                path = folder / f"{workflow.title}.json"
                path.write_text(text + "\n", encoding="utf-8")
                show(page, folder / f"{workflow.title}.jpg")
                page.close()
                print(path.name)
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
