"""How a node is connected in the graph that is being run."""

from __future__ import annotations

from collections.abc import Mapping


def leads_anywhere(graph: Mapping | None, node_id: str | None, output: int) -> bool:
    """True if some input in `graph` (API format) is linked to that output of that node.

    Also true where it cannot be known: no graph, or a node that another one expanded into it.
    """
    if not graph or node_id is None or str(node_id) not in graph:
        return True
    link = [str(node_id), output]
    return any(
        isinstance(value, list) and len(value) == 2 and [str(value[0]), value[1]] == link
        for node in graph.values()
        for value in node.get("inputs", {}).values()
    )


def is_read(graph: Mapping | None, node_id: str | None, output: int) -> bool:
    """The same, false where it cannot be known."""
    known = bool(graph) and node_id is not None and str(node_id) in graph
    return known and leads_anywhere(graph, node_id, output)


def source_of(graph: Mapping | None, node_id: str | None, name: str) -> str | None:
    """The type of the node that an input is linked to in `graph` (API format); None where it is
    not linked, or where that is not known."""
    if not graph or node_id is None or str(node_id) not in graph:
        return None
    value = graph[str(node_id)].get("inputs", {}).get(name)
    if not (isinstance(value, list) and len(value) == 2):
        return None
    return graph.get(str(value[0]), {}).get("class_type", "another node")


def running_graph(node_id: str | None) -> Mapping | None:
    """The graph being run now that has this node; None where the host does not say.

    The host asks for a node's fingerprint without its graph, yet what the node has to load depends
    on which of its outputs are connected.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or node_id is None:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    graphs = (item[2] for item in running)
    return next((graph for graph in graphs if str(node_id) in graph), None)
