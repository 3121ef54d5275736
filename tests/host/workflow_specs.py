"""What a workflow is: nodes in columns and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

BLUE, GREEN, PURPLE, _NOTE = "#6fb1e0", "#8fce8f", "#b79ad9", "#2b3138"
Link = tuple[str, str, str, str]
"""(node, output, node, input)."""


@dataclass(frozen=True)
class Node:
    """One node: a name for links, its type, and the widgets that differ from their defaults."""

    name: str
    type: str
    title: str | None = None
    widgets: dict = field(default_factory=dict)
    models: list = field(default_factory=list)
    height: int = 0
    color: str | None = None


@dataclass(frozen=True)
class Column:
    """Nodes below each other in one group."""

    title: str
    nodes: list[Node]
    width: int = 340
    color: str = BLUE


@dataclass(frozen=True)
class Workflow:
    """A file in workflows/; the title is the file's name and what the template browser shows."""

    title: str
    id: str
    columns: list[Column]
    links: list[Link]


def numbered(title: str, number: int, columns: Sequence[Column], links: list[Link]) -> Workflow:
    """A workflow whose columns are counted from 1; ``number`` makes its id."""
    counted = [replace(c, title=f"{i}. {c.title}") for i, c in enumerate(columns, 1)]
    return Workflow(title, f"1de06a40-0000-4000-8000-{number:012d}", counted, links)


def note(text: str, title: str, height: int) -> Node:
    """A note that the page draws as Markdown."""
    return Node("note", "MarkdownNote", title, {"text": text}, height=height, color=_NOTE)
