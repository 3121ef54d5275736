"""Compare levels in a running ComfyUI: connected pictures, and folders that earlier runs saved."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant.tests.host.graphs import node
from ideogram4_quant.tests.host.server import Run, Server

pytestmark = pytest.mark.host
GREYS = {"full": 0x808080, "near": 0x828282, "far": 0xA0A0A0}
# 20 log10(255 / difference), by hand: the pictures are plain.
NEAR, FAR = 42.11, 18.03


def pictures(prefix: str | None = None) -> dict:
    """Three batches of plain pictures, saved under ``prefix`` if there is one."""
    graph = {}
    for name, color in GREYS.items():
        graph[name] = node("EmptyImage", width=64, height=32, batch_size=3, color=color)
        if prefix is not None:
            target = f"{prefix}/{name}/picture"
            graph[f"save {name}"] = node("SaveImage", images=(name, 0), filename_prefix=target)
    return graph


def compared(graph: dict, **inputs) -> dict:
    return graph | {
        "compare": node("Ideogram4QuantCompare", **{"names": "", **inputs}),
        "table": node("PreviewAny", source=("compare", 1)),
        "sheet": node("SaveImage", images=("compare", 0), filename_prefix="sheet"),
    }


def connected() -> dict:
    return {f"pictures.level{i}": (name, 0) for i, name in enumerate(GREYS)}


def table_of(run: Run) -> str:
    assert run.status == "success", run.error
    return run.outputs["table"]["text"][0]


def check(table: str) -> None:
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:1] == "|"}
    assert "**full** (reference)" in lines
    for name, expected in (("near", NEAR), ("far", FAR)):
        assert f"{expected:.2f}" in lines[name]


def sheets(server: Server, run: Run, name: str) -> list[np.ndarray]:
    found = [server.fetch(image) for image in run.outputs[name]["images"]]
    return [np.asarray(Image.open(io.BytesIO(data))) for data in found]


def test_connected_pictures_give_a_table_a_sheet_and_difference_maps(server):
    graph = compared(pictures(), **connected(), names="full\nnear\nfar", differences=True)
    run = server.run(graph)
    check(table_of(run))
    first, second = sheets(server, run, "sheet")
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    shown = sheets(server, run, "compare")  # on the node itself
    assert np.array_equal(shown[0], first)


def test_metrics_without_their_package_say_what_to_install(server):
    table = table_of(server.run(compared(pictures(), **connected())))
    has_ssim = "| SSIM" in table.splitlines()[0]
    assert has_ssim != ("SSIM: needs torchmetrics (pip install torchmetrics)" in table)


def test_folders_of_earlier_runs_are_compared_and_read_again(server):
    server.run(pictures("levels"))
    folders = "\n".join(f"{name} = levels/{name}" for name in GREYS)
    graph = compared({}, folders=folders)
    check(table_of(server.run(graph)))
    server.run(pictures("levels"))
    second = server.run(graph)  # the same graph: the folders hold more now
    assert "6 prompts" in table_of(second)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "nothing to compare"),
        ({"folders": "a = ../../elsewhere\nb = x"}, "outside ComfyUI's output folder"),
        ({"folders": "a = no-such-folder\nb = nor-this"}, "no folder of pictures"),
    ],
)
def test_bad_inputs_end_the_run_with_a_reason(server, inputs, message):
    run = server.run(compared({}, **inputs))
    assert run.status == "error"
    assert message in str(run.error)
