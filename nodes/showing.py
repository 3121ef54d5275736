"""Text on a node itself."""

from __future__ import annotations


def show(text: str, node_id: str | None) -> None:
    """Text on the node in the host's page; nowhere without one."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
