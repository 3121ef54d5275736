"""Copies of two levels in a real ComfyUI: loaded by the node, reported, and refused with words."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ideogram4_quant.checkpoint.level_order import SAME
from ideogram4_quant.pocket import paths
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.server import Rejected

pytestmark = pytest.mark.host
TWO = {"level": "INT8 W8A8", "unconditional_level": "Q4_K"}
SEED = 5


def run(server, graph) -> tuple[Image.Image, str]:
    """(the picture, the sampler's report)"""
    done = server.run(graph)
    assert done.status == "success", done.error
    saved = server.fetch(done.outputs["saved"]["images"][0])
    return Image.open(io.BytesIO(saved)), done.outputs["report"]["text"][0]


def refused(server, graph) -> str:
    done = server.run(graph)
    assert done.status == "error"
    return done.error["exception_message"]


def noise_of_the_host(seed: int, height: int, width: int) -> torch.Tensor:
    """Tokens [1, N, C]: the engine draws as diffusers does, the host in the shape of its latent."""
    rows, columns = height // 16, width // 16
    generator = torch.Generator("cpu").manual_seed(seed)
    latent = torch.randn((1, 128, rows, columns), generator=generator)
    channels_first = latent.reshape(32, 2, 2, rows, columns)
    return channels_first.permute(3, 4, 1, 2, 0).reshape(1, rows * columns, 128)


@pytest.fixture(scope="module")
def two(server) -> tuple[Image.Image, str]:
    return run(server, graphs.with_sampler("two", seed=SEED, **TWO))


def test_the_picture_is_the_engines(two, models):
    from ideogram4_quant.engine.encoder import load_encoder
    from ideogram4_quant.engine.generate import GenerateRequest, generate
    from ideogram4_quant.engine.loading import load_pair, open_pair, pair_label
    from ideogram4_quant.engine.vae import load_vae

    folder = models / "diffusion_models"
    pair = open_pair(
        folder / "pocket-INT8_W8A8-conditional.safetensors",
        folder / "pocket-Q4_K-unconditional.gguf",
    )
    assert pair_label(pair) == "INT8 W8A8 + Q4_K"
    encoder = load_encoder(paths.encoder_dir(), device="cpu")
    loaded = load_pair(pair, encoder, load_vae(paths.vae_dir(), device="cpu"), device="cpu")
    request = GenerateRequest(graphs.CAPTION, 128, 64, seed=SEED, preset="turbo")
    made = generate(request, loaded, noise=noise_of_the_host(SEED, 64, 128)).image
    wanted = np.asarray(made, dtype=np.float64)
    found = np.asarray(two[0].convert("RGB"), dtype=np.float64)
    error = ((found - wanted) ** 2).mean()
    assert 10 * math.log10(255**2 / max(error, 1e-9)) > 45


def test_both_levels_are_named(server, two):
    note = json.loads(two[0].text["ideogram4_quant"])
    assert note["level"] == "INT8 W8A8 + Q4_K"
    assert note["files"]["unconditional"]["name"] == "pocket-Q4_K-unconditional.gguf"
    graph = graphs.parts(**TWO) | {"shown": graphs.node("PreviewAny", source=("model", 2))}
    text = server.run(graph).outputs["shown"]["text"][0]
    assert text.startswith("INT8 W8A8 + Q4_K, both copies, ")
    assert "conditional: pocket-INT8_W8A8-conditional.safetensors" in text
    assert "unconditional: pocket-Q4_K-unconditional.gguf" in text
    assert "  Q4_K computed as " in text  # in which of the two ways is measured


def test_it_differs_from_two_equal_levels_and_an_old_workflow_from_nothing(server, two):
    old, _ = run(server, graphs.with_sampler("old", seed=SEED, level="INT8 W8A8"))
    same = {"level": "INT8 W8A8", "unconditional_level": SAME}
    named, _ = run(server, graphs.with_sampler("same", seed=SEED, **same))
    assert old.tobytes() == named.tobytes()
    assert old.tobytes() != two[0].tobytes()


def test_a_file_picked_by_name_goes_with_a_level(server, two):
    name = "pocket-INT8_W8A8-conditional.safetensors"
    graph = graphs.with_sampler(
        "named", seed=SEED, level="BF16", conditional_file=name, unconditional_level="Q4_K"
    )
    assert run(server, graph)[0].tobytes() == two[0].tobytes()


def test_what_does_not_go_together_stops_with_words(server):
    missing = graphs.with_sampler("missing", level="BF16", unconditional_level="NF4")
    assert "no NF4 file of Ideogram 4 that holds the unconditional copy" in refused(server, missing)
    named = graphs.with_sampler(
        "none", conditional_file=graphs.CONDITIONAL, unconditional_level="NF4"
    )
    assert "no unconditional copy of NF4 goes with this file" in refused(server, named)
    one = graphs.with_sampler("one", branches="one", **TWO)
    assert "a model of one branch has no unconditional copy" in refused(server, one)
    with pytest.raises(Rejected, match="unconditional_level"):
        server.run(graphs.with_sampler("gone", level="BF16", unconditional_level="Q9"))


def test_a_level_that_the_dropdown_does_not_have_is_checked_again_at_load(server):
    """A value that comes by a link passes the host's check of the list."""
    graph = graphs.with_sampler("linked", level="BF16", unconditional_level=("word", 0))
    graph["word"] = graphs.node("PrimitiveString", value="Q9")
    try:
        said = refused(server, graph)
    except Rejected as error:  # a host that compares the types of links
        said = str(error)
        assert "unconditional_level" in said
    else:
        assert "there is no such level" in said
