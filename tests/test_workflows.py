"""The workflows that come with the pack: their nodes, links, downloads and thumbnails."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from ideogram4_quant.checkpoint.level_order import AUTO, LEVELS
from ideogram4_quant.tests.workflow_files import FILES, every_file, load, of_type

TITLE_BAR = 30


def box(node: dict) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) with the title bar, which lies above a node's position."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


def group_box(group: dict) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: tuple, b: tuple) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def test_every_workflow_is_here():
    stems = " ".join(file.stem for file in FILES)
    assert len(FILES) >= 10
    for words in (
        "one branch",
        "one copy",
        "INT8",
        "Q8_0",
        "Q4_K",
        "low VRAM",
        "LoRA",
        "image to image",
        "compare",
        "own",
    ):
        assert words in stems
    assert len({load(file)["id"] for file in FILES}) == len(FILES)


@every_file
def test_nothing_overlaps_and_every_node_lies_in_one_group(file):
    workflow = load(file)
    groups = [group_box(group) for group in workflow["groups"]]
    for one, other in itertools.combinations(workflow["nodes"], 2):
        assert not overlap(box(one), box(other)), (one["type"], other["type"])
    for one, other in itertools.combinations(groups, 2):
        assert not overlap(one, other)
    for node in workflow["nodes"]:
        assert sum(inside(box(node), group) for group in groups) == 1, node["type"]
    assert all(group["title"].strip() for group in workflow["groups"])


@every_file
def test_links_agree_with_the_sockets_they_join(file):
    workflow = load(file)
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    for number, source, output, target, place, _ in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
    used = {i["link"] for n in workflow["nodes"] for i in n["inputs"]} - {None}
    assert used == {link[0] for link in workflow["links"]}


@every_file
def test_downloads_are_named_where_the_page_and_the_reader_look(file):
    workflow = load(file)
    notes = "\n".join(n["widgets_values"][0] for n in of_type(workflow, "MarkdownNote"))
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
            assert not model["name"].endswith(".gguf"), "the page hides these links"
            assert model["url"] in notes
    if of_type(workflow, "Ideogram4QuantQuantize"):
        assert "models/diffusion_models" in notes
        return
    loaders = of_type(workflow, "Ideogram4QuantLoad")
    assert loaders
    assert all(loader["widgets_values"][0] in (AUTO, *LEVELS) for loader in loaders)
    (vae,) = of_type(workflow, "VAELoader")
    (encoder,) = of_type(workflow, "Ideogram4QuantLoadEncoder")
    for node in (vae, encoder):
        assert node["widgets_values"][0] in notes
    for folder in ("models/diffusion_models", "models/text_encoders", "models/vae"):
        assert folder in notes


@every_file
def test_thumbnail_is_a_small_jpeg(file):
    picture = file.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert np.asarray(image).std() > 1
