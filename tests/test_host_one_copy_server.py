"""Guidance from one resident copy through the server, in the words of the nodes."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ideogram4_quant.pocket import paths
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.server import Rejected

pytestmark = pytest.mark.host
LORA = "pocket_uncond.safetensors"
ONE = {"unconditional_from": "conditional copy"}


@pytest.fixture(scope="module", autouse=True)
def lora(models):
    """A random update of the first blocks of the pocket model, in ai-toolkit's names."""
    weights = load_file(paths.dit_path("cond"))
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name in ("layers.0.attention.qkv", "layers.1.feed_forward.w2"):
        n, k = weights[f"{name}.weight"].shape
        down = torch.randn(4, k, generator=generator) / k**0.5
        up = torch.randn(n, 4, generator=generator) * 0.1
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, models / "loras" / LORA)


def run(server, graph) -> tuple[bytes, str]:
    """(the picture's pixels, the sampler's report)"""
    done = server.run(graph)
    assert done.status == "success", done.error
    saved = server.fetch(done.outputs["saved"]["images"][0])
    return Image.open(io.BytesIO(saved)).tobytes(), done.outputs["report"]["text"][0]


def chained() -> dict:
    """The same by Load LoRA, with the conditional copy on both of its inputs."""
    graph = graphs.with_sampler("chained", models=(("lora", 0), ("lora", 1)))
    graph["lora"] = graphs.node(
        "Ideogram4QuantLoadLora",
        conditional=("model", 0),
        unconditional=("model", 0),
        lora=LORA,
        strength=1.0,
        apply_to="unconditional",
    )
    return graph


def test_the_loader_and_the_lora_node_make_the_same_picture_and_say_how(server):
    by_loader, said = run(server, graphs.with_sampler("loader", unconditional_lora=LORA))
    by_node, said_too = run(server, chained())
    two, _ = run(server, graphs.with_sampler("two"))
    assert by_loader == by_node
    assert by_loader != two
    assert f"unconditional: the conditional copy with {LORA}" in said
    assert f"unconditional: the conditional copy with {LORA} at 1" in said_too
    for report in (said, said_too):
        assert "copies on the device: one, for both passes" in report


def test_the_loaders_report_names_the_lora_and_no_second_file(server):
    graph = graphs.with_sampler("said", unconditional_lora=LORA)
    graph["loaded"] = graphs.node("PreviewAny", source=("model", 2))
    text = server.run(graph).outputs["loaded"]["text"][0]
    assert f"unconditional: the conditional copy with {LORA} (2 linears, rank 4" in text
    assert "half a model" not in text


def test_image_tokens_alone_need_no_second_model_and_are_reported(server):
    graph = graphs.with_sampler("self", models=(("model", 0), None), sampler=ONE)
    picture, said = run(server, graph)
    alone, _ = run(server, graphs.with_sampler("alone", models=(("model", 0), None)))
    assert "unconditional: the conditional copy on image tokens alone" in said
    assert picture != alone
    graph = graphs.with_guider("self too", models=(("model", 0), None), guider=ONE)
    done = server.run(graph)
    saved = server.fetch(done.outputs["saved"]["images"][0])
    assert Image.open(io.BytesIO(saved)).tobytes() == picture


def test_what_does_not_go_together_stops_with_words(server):
    def refused(graph) -> str:
        done = server.run(graph)
        assert done.status == "error"
        return done.error["exception_message"]

    same = graphs.with_sampler("same", models=(("model", 0), ("model", 0)))
    assert "one model is connected as both copies" in refused(same)
    both = graphs.with_sampler("both", sampler=ONE)
    assert "but another model is connected" in refused(both)
    name = paths.dit_path("uncond").name
    twice = graphs.with_sampler("twice", unconditional_lora=LORA, unconditional_file=name)
    assert "each stands for the unconditional copy" in refused(twice)
    with pytest.raises(Rejected, match="gone"):
        server.run(graphs.with_sampler("gone", unconditional_lora="gone.safetensors"))
