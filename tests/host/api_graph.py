"""A workflow file as the page would queue it, without a page: widgets by name, links, no notes."""

from __future__ import annotations

_NOT_QUEUED = ("MarkdownNote", "Note")
_OF_THE_PAGE = ("control_after_generate", "upload", "fixed")


def api_graph(workflow: dict) -> dict[str, dict]:
    """API format of a workflow without subgraphs, all of whose widgets are stored by name."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in _NOT_QUEUED:
            continue
        inputs = {
            # as the page does it: a bare list would be a link
            name: {"__value__": value} if isinstance(value, list) else value
            for name, value in (node.get("widgets_values_named") or {}).items()
            if name not in _OF_THE_PAGE
        }
        linked = ((entry["name"], entry.get("link")) for entry in node.get("inputs", []))
        inputs |= {name: sources[link] for name, link in linked if link is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
