"""Prompts of different levels in one queue, and two servers on one folder of models."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.locate import Host
from ideogram4_quant.tests.host.server import Server, make_base

pytestmark = pytest.mark.host
LEVELS = ("INT8 W8A8", "Q4_K")


@pytest.fixture
def second(host: Host, models: Path, tmp_path: Path) -> Iterator[Server]:
    """Another server with folders of its own, but for the models."""
    base = tmp_path / "second"
    base.mkdir()
    (base / "models").symlink_to(models, target_is_directory=True)
    running = Server(host, make_base(base))
    yield running
    running.close()


def queue(server: Server, level: str) -> str:
    """The id of a prompt that is put into the queue and not waited for."""
    graph = graphs.with_sampler(f"queued {level}", seed=77, level=level)
    return server.post("/prompt", {"prompt": graph})["prompt_id"]


def picture(server: Server, prompt_id: str) -> np.ndarray:
    run = server.wait(prompt_id, 600)
    assert run.status == "success", run.error
    return np.asarray(Image.open(io.BytesIO(server.fetch(run.outputs["saved"]["images"][0]))))


def test_two_levels_in_a_queue_and_two_servers_on_one_folder(server: Server, second: Server):
    """All at once, in opposite orders: a level's picture is the same whatever ran before it."""
    ids = {(server, level): queue(server, level) for level in LEVELS}
    ids |= {(second, level): queue(second, level) for level in reversed(LEVELS)}
    found = {key: picture(key[0], prompt_id) for key, prompt_id in ids.items()}
    for level in LEVELS:
        assert np.array_equal(found[server, level], found[second, level]), level
    assert not np.array_equal(found[server, LEVELS[0]], found[server, LEVELS[1]])
    assert server.alive()
    assert second.alive()
