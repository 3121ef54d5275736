"""The subgraph that the host's node library offers: one node from a caption to a picture."""

from __future__ import annotations

import json
from pathlib import Path

from .browser import Browser
from .workflow_content import SENTENCE
from .workflow_parts import (
    CAPTION_LINK,
    PICTURE,
    SAVED,
    caption,
    caption_column,
    loader,
    models_column,
    sampler,
    sampler_column,
    sampling,
)
from .workflow_specs import Workflow, numbered

NAME = "Ideogram 4 (quantized)"
PROMOTED = (
    ("Ideogram4QuantCaption", "text", "caption"),
    ("Ideogram4QuantCaption", "aspect_ratio", None),
    ("Ideogram4QuantLoad", "level", None),
    ("Ideogram4QuantSampler", "preset", None),
    ("Ideogram4QuantSampler", "seed", None),
)
_ID = "1de06a40-0000-4000-8000-0000000000b1"
_BUILD = (Path(__file__).parent / "build_blueprint.js").read_text(encoding="utf-8")
_DESCRIPTION = (
    "Ideogram 4 in one node: a sentence in, a picture out. Level auto takes the best of your files "
    "that fits this device."
)


def inside() -> Workflow:
    """What becomes the subgraph, and the node that its picture goes to."""
    columns = [
        models_column(loader(models=[])),
        caption_column(caption(SENTENCE)),
        sampler_column(sampler()),
        PICTURE,
    ]
    return numbered(NAME, 99, columns, [CAPTION_LINK, *sampling(), SAVED])


def fold(page: Browser) -> dict:
    """The graph on the page, which is `inside`, as a blueprint's file."""
    page.run(f"({_BUILD})({json.dumps(PROMOTED)}, ['SaveImage'])")
    data = json.loads(page.run("JSON.stringify(app.graph.serialize())"))
    (subgraph,) = data["definitions"]["subgraphs"]
    (node,) = data["nodes"]
    data = json.loads(json.dumps(data).replace(subgraph["id"], _ID))
    (subgraph,), (node,) = data["definitions"]["subgraphs"], data["nodes"]
    subgraph |= {"name": NAME, "category": "Ideogram 4 Quant", "description": _DESCRIPTION}
    node["title"] = NAME
    for output in node["outputs"]:
        output["links"] = []
    return data
