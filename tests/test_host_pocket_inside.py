"""The pocket model from inside the pack in a real ComfyUI, and picks that are not here."""

from __future__ import annotations

import numpy as np
import pytest

from ideogram4_quant.tests.host import graphs, runs
from ideogram4_quant.tests.host.pocket_variant import COPIES, ENCODER, VAE
from ideogram4_quant.tests.host.server import Rejected

pytestmark = pytest.mark.host
ABSENT = "ideogram4_int8_convrot.safetensors"


def test_it_paints_what_copies_of_its_files_paint(server):
    level = {"level": "BF16"}
    copies = runs.picture(server, server.run(graphs.with_sampler("copies", **level)))
    inside = graphs.with_sampler("inside", encoder=ENCODER, vae=VAE, **level, **COPIES)
    assert np.array_equal(runs.picture(server, server.run(inside)), copies)


def test_the_other_copy_of_a_picked_one_is_its_own(server):
    graph = graphs.with_sampler("one", conditional_file=COPIES["conditional_file"], level="auto")
    run = server.run(graph)
    assert run.status == "success", run.error
    report = next(t for o in run.outputs.values() for t in o.get("text", ()) if "both" in t)
    assert COPIES["unconditional_file"] in report


def test_auto_passes_over_a_pick_that_is_not_here_and_says_so(server):
    graph = graphs.with_sampler("absent", conditional_file=ABSENT, level="auto")
    run = server.run(graph)
    assert run.status == "success", run.error
    texts = [text for out in run.outputs.values() for text in out.get("text", ())]
    assert any(f"not here: {ABSENT}" in text for text in texts)
    assert f"not here: {ABSENT}" in server.log


def test_with_a_level_it_is_refused_by_name(server):
    with pytest.raises(Rejected) as refused:
        server.run(graphs.with_sampler("absent", conditional_file=ABSENT, level="BF16"))
    assert ABSENT in str(refused.value)


def test_a_level_that_there_is_not_is_refused(server):
    with pytest.raises(Rejected) as refused:
        server.run(graphs.with_sampler("absent", level="Q9_9"))
    assert "There is no level" in str(refused.value)


def test_the_sampler_decodes_with_a_vae_as_the_host_does_and_asks_for_one(server):
    graph = graphs.with_sampler("decoded")
    ours = {k: v for k, v in graph.items() if k != "decoded"}
    ours["saved"] = graphs.node("SaveImage", images=("sampled", 2), filename_prefix="ours")
    run = server.run(ours)
    assert "vae of the sampler" in run.error["exception_message"]
    ours["sampled"]["inputs"]["vae"] = ["vae", 0]
    pictures = [runs.picture(server, server.run(g)) for g in (graph, ours)]
    assert np.array_equal(*pictures)
