"""What a graph that a server ran gave: pictures, texts, failures that it survived."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from . import graphs
from .server import Rejected, Run, Server


def picture(server: Server, run: Run, node: str = "saved") -> np.ndarray:
    """The first picture that a node saved, uint8 [H, W, 3]."""
    assert run.status == "success", run.error
    data = server.fetch(run.outputs[node]["images"][0])
    return np.asarray(Image.open(io.BytesIO(data)))


def text(run: Run, node: str) -> str:
    """What a node showed as text."""
    return run.outputs[node]["text"][0]


def fails_with(server: Server, graph: dict, *words: str) -> None:
    """The run fails with a message that has these words, and the next run works."""
    run = server.run(graph)
    assert run.status == "error"
    message = run.error["exception_message"]
    for word in words:
        assert word in message
    next_one_works(server)


def rejected_with(server: Server, graph: dict, *words: str) -> None:
    """The server refuses the graph in such words, and runs the next one."""
    try:
        server.run(graph)
    except Rejected as refusal:
        message = str(refusal)
    else:
        raise AssertionError("the graph was taken")
    for word in words:
        assert word in message
    next_one_works(server)


def next_one_works(server: Server) -> None:
    """The server makes a picture."""
    assert picture(server, server.run(graphs.with_sampler())).shape == (64, 128, 3)
    assert server.alive()
