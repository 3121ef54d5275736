"""What a person meets in a real ComfyUI: a copy that is missing, any size, reports, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.runs import next_one_works, picture, text

pytestmark = pytest.mark.host
CONDITIONAL_ALONE = "Q5_K"


@pytest.fixture(scope="module")
def half(models: Path):
    """A level of which only the conditional copy is there."""
    folder = models / "diffusion_models"
    path = folder / "half-cond-Q5_K.gguf"
    quantize_checkpoint(folder / graphs.CONDITIONAL, CONDITIONAL_ALONE, path)
    yield CONDITIONAL_ALONE
    path.unlink()


def error_of(server, graph: dict) -> dict:
    run = server.run(graph)
    assert run.status == "error"
    return run.error


def test_connected_copy_that_is_missing_is_an_error_that_says_what_to_do(server, half):
    error = error_of(server, graphs.with_sampler(level=half))
    message = error["exception_message"]
    assert error["node_type"] == "Ideogram4QuantLoad"
    assert "the unconditional copy of Q5_K is missing" in message
    assert "models/diffusion_models and press R" in message
    assert "remove the connection from the output unconditional" in message
    assert error["exception_type"] == "ideogram4_quant.PairMismatchError"
    next_one_works(server)


def test_without_the_connection_the_same_level_paints_without_guidance(server, half):
    run = server.run(graphs.with_sampler("half", level=half, models=(("model", 0), None)))
    assert picture(server, run).shape == (64, 128, 3)
    assert "without guidance, as no unconditional copy is connected" in text(run, "report")
    assert "passes: 12 conditional\n" in text(run, "report")


@pytest.mark.parametrize("kind", ["Ideogram4QuantSampler", "Ideogram4QuantGuider"])
def test_connection_that_brings_nothing_is_named(server, kind):
    """A LoRA node that got no unconditional copy, with its output connected all the same."""
    ways = {
        "Ideogram4QuantSampler": graphs.with_sampler,
        "Ideogram4QuantGuider": graphs.with_guider,
    }
    graph = ways[kind](models=(("lora", 0), ("lora", 1)))
    graph["lora"] = graphs.node(
        "Ideogram4QuantLoadLora", conditional=("model", 0), lora="none", strength=1.0
    )
    error = error_of(server, graph)
    assert error["node_type"] == kind
    assert "nothing from Ideogram4QuantLoadLora" in error["exception_message"]
    assert "not connected" not in error["exception_message"]
    unguided = graphs.with_sampler(
        "one", models=(("lora", 0), ("lora", 1)), sampler={"guidance": "1"}
    )
    unguided["lora"] = graph["lora"]
    shown = text(server.run(unguided), "report")
    assert "without guidance, as guidance is 1 at every step" in shown
    assert "not connected" not in shown


@pytest.mark.parametrize(("asked", "made"), [((130, 64), (128, 64)), ((121, 70), (128, 64))])
def test_any_size_is_rounded_to_the_grid_and_said(server, asked, made):
    run = server.run(graphs.with_sampler("odd", size=asked))
    assert picture(server, run).shape == (made[1], made[0], 3)
    first, *rest = text(run, "report").splitlines()
    assert first.startswith(f"{made[0]}x{made[1]}, preset turbo, 12 steps in ")
    assert any(f"{asked[0]}x{asked[1]} was rounded to {made[0]}x{made[1]}" in line for line in rest)


def test_sizes_of_the_hosts_selector_are_taken(server):
    """Whose multiple is 8: at 16:9 and 0.1 megapixels it gives 432x240, at 2:3 264x400."""
    for ratio, size in {
        "16:9 (Widescreen)": (432, 240),
        "2:3 (Portrait Photo)": (272, 400),
    }.items():
        graph = graphs.with_sampler("selected", preset="turbo", sampler={"steps": 1})
        graph["size"] = graphs.node(
            "ResolutionSelector", aspect_ratio=ratio, megapixels=0.1, multiple=8
        )
        graph["sampled"]["inputs"] |= {"width": ["size", 0], "height": ["size", 1]}
        assert picture(server, server.run(graph)).shape == (size[1], size[0], 3)


def test_aspect_ratio_goes_before_width_and_height(server):
    settings = {"aspect_ratio": "2:1", "megapixels": 0.1, "steps": 1}
    run = server.run(graphs.with_sampler("ratio", sampler=settings))
    assert picture(server, run).shape == (224, 464, 3)
    assert text(run, "report").startswith("464x224, ")


def test_report_says_seed_speed_guidance_passes_and_memory(server):
    shown = text(server.run(graphs.with_sampler("told", seed=77)), "report").splitlines()
    assert shown[0].startswith("128x64, preset turbo, 12 steps in ")
    assert shown[0].endswith("s a step after the first")
    assert shown[1] == "seed: 77"
    assert "guidance: 7*11, 3" in shown
    assert "passes: 12 conditional, 12 unconditional" in shown
    assert any(line.startswith("peak memory: ") and " GB of RAM" in line for line in shown)
    assert not any(line.startswith(("sigmas", "fused")) for line in shown)
    longer = graphs.with_sampler("told", seed=77, sampler={"details": True})
    assert "sigmas: " in text(server.run(longer), "report")


@pytest.mark.parametrize(("cache", "settings"), [("EasyCache", {}), ("LazyCache", {})])
def test_passes_that_another_nodes_cache_skips_are_counted(server, cache, settings):
    """Their threshold is set so high that they skip all steps they may."""
    graph = graphs.with_sampler(
        "cached", models=(("cache", 0), ("model", 1)), preset="default", seed=5
    )
    graph["cache"] = graphs.node(
        cache,
        model=("model", 0),
        reuse_threshold=3.0,
        start_percent=0.15,
        end_percent=0.95,
        verbose=False,
    )
    shown = text(server.run(graph), "report")
    (passes,) = (line for line in shown.splitlines() if line.startswith("passes: "))
    conditional = int(passes.split()[1])
    assert 2 <= conditional < 20
    (skipped,) = (line for line in shown.splitlines() if line.startswith("skipped by another"))
    assert f"{20 - conditional} conditional" in skipped


def test_files_of_ideogram_4_come_first(server, models):
    """A file of another model whose name sorts before all, and one of ours that sorts last."""
    folder = models / "diffusion_models"
    other, ours = folder / "aaa-other.safetensors", folder / "zzz.safetensors"
    save_file({"model.weight": torch.zeros(2, 2)}, other)
    ours.write_bytes((folder / graphs.CONDITIONAL).read_bytes())
    try:
        info = server.get("/object_info")
        for node, name in (
            ("Ideogram4QuantLoad", "conditional_file"),
            ("Ideogram4QuantQuantize", "source"),
        ):
            inputs = info[node]["input"]["required"] | info[node]["input"]["optional"]
            spec = inputs[name]
            listed = spec[1].get("options") or spec[0]
            listed = [n for n in listed if not n.startswith("pocket/")]  # the pack's own, last
            assert listed[-1] == other.name
            assert listed.index(ours.name) < listed.index(other.name)
    finally:
        other.unlink()
        ours.unlink()


LABELS = """
(() => {
  app.graph.clear();
  const node = LiteGraph.createNode('Ideogram4QuantLoad');
  app.graph.add(node);
  const level = node.widgets.find(w => w.name === 'level');
  const label = level.options.getOptionLabel ?? String;
  return JSON.stringify(Object.fromEntries(level.options.values.map(v => [v, label(v)])));
})()
"""


def test_levels_without_a_file_are_marked_in_the_page(half, browser):
    labels = json.loads(browser.run(LABELS))
    there = {"auto", "BF16", "INT8 W8A8", "Q8_0", "Q4_K", CONDITIONAL_ALONE}
    for level, label in labels.items():
        assert label == (level if level in there else f"{level} (no file)")
    assert {"NF4", "Q2_K"} <= labels.keys()  # the values are the levels' names
    assert browser.errors == []
