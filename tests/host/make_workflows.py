"""Builds workflows/*.json, their pictures and subgraphs/*.json in ComfyUI's own interface.

``python -m ideogram4_quant.tests.host.make_workflows [TITLE ...]``: the interface makes the nodes
and writes the files, so that they are what a user's own export would be; then the pocket model
paints what each makes. ``--look FOLDER`` also puts screenshots of the graphs there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import blueprint, thumbnails
from .browser import Browser, find_browser
from .locate import PACK, find_host
from .server import Server, make_base
from .workflow_page import fit, open_page, show
from .workflow_specs import Column, Workflow
from .workflows import PLACEHOLDERS, WORKFLOWS

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


def _write(path: Path, data: dict) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False, separators=_SEPARATORS)
    path.write_text(text + "\n", encoding="utf-8")
    print(path.name, flush=True)


def _draw(server: Server, program: str, titles: Sequence[str], look: Path | None) -> None:
    for workflow in (*WORKFLOWS, blueprint.inside()):
        if titles and workflow.title not in titles:
            continue
        # small as a laptop's window: a workflow opens with the view that is saved, whole there too
        page = Browser(
            program, 1600, 900
        )  # a page of its own: one keeps what nodes of these ids have shown
        try:
            open_page(page, server.url)
            data = json.loads(build(page, workflow))
            if workflow.title == blueprint.NAME:
                _write(PACK / "subgraphs" / f"{blueprint.NAME}.json", blueprint.fold(page))
                continue
            data["id"] = workflow.id
            _write(PACK / "workflows" / f"{workflow.title}.json", data)
            if look is not None:
                show(page, look / f"{workflow.title}.jpg")
        finally:
            page.close()


def _paint(server: Server, titles: Sequence[str]) -> None:
    paths = {w.title: PACK / "workflows" / f"{w.title}.json" for w in WORKFLOWS}
    loaded = {title: json.loads(p.read_text(encoding="utf-8")) for title, p in paths.items()}
    for title, path in paths.items():
        if not titles or title in titles:
            thumbnails.thumbnail(server, title, loaded, path.with_suffix(".jpg"))
            print(path.with_suffix(".jpg").name, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*")
    parser.add_argument("--look", type=Path)
    asked = parser.parse_args(arguments)
    host, program = find_host(), find_browser()
    if isinstance(host, str) or program is None:
        print(host if isinstance(host, str) else "no Chromium found (set CHROMIUM)")
        return 1
    for folder in (PACK / "workflows", PACK / "subgraphs"):
        folder.mkdir(exist_ok=True)
    if asked.look is not None:
        asked.look.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        thumbnails.prepare(Path(base))
        placeholders = [Path(base) / "models" / kind / name for kind, name in PLACEHOLDERS]
        for path in placeholders:
            path.touch()
        server = Server(host, Path(base))
        try:
            _draw(server, program, asked.titles, asked.look)
            for path in placeholders:
                path.unlink()
            _paint(server, asked.titles)
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
