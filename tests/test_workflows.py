"""The workflows that come with the pack: their nodes, links, downloads and thumbnails."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from ideogram4_quant.checkpoint.level_order import AUTO
from ideogram4_quant.tests.host.locate import PACK
from ideogram4_quant.tests.host.pocket_variant import BY_LEVEL, value
from ideogram4_quant.tests.host.workflows import WORKFLOWS
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


MOST_NODES = 9
WORDS = ("try it now", "text to image", "8 steps", "half the memory", "LoRA", "image to image")


def test_every_workflow_is_here():
    stems = [file.stem for file in FILES]
    for words in (*WORDS, "compare", "quantize your own"):
        assert sum(words in stem for stem in stems) == 1, words
    assert len(FILES) == len(WORDS) + 2
    assert len({load(file)["id"] for file in FILES}) == len(FILES)


@every_file
def test_a_workflow_is_small_and_has_one_box_to_write_in(file):
    workflow = load(file)
    assert len(workflow["nodes"]) <= MOST_NODES
    assert not of_type(workflow, "PreviewAny"), "reports show on their own node"
    captions = of_type(workflow, "Ideogram4QuantCaption")
    assert len(captions) == (not of_type(workflow, "Ideogram4QuantQuantize"))


def test_widgets_are_those_of_the_specs_and_else_the_same_in_every_workflow():
    """A page keeps values by a node's id, so that one workflow's could get into the next one."""
    elsewhere: dict[tuple, object] = {}
    for spec in WORKFLOWS:
        nodes = load(PACK / "workflows" / f"{spec.title}.json")["nodes"]
        specs = [node for column in spec.columns for node in column.nodes]
        for node, wanted in zip(nodes, specs, strict=True):
            assert node["type"] == wanted.type
            for name, found in (node.get("widgets_values_named") or {}).items():
                key = (wanted.type, name)
                if name in wanted.widgets:
                    assert found == wanted.widgets[name], (spec.title, key)
                elif wanted.type.startswith("Ideogram4Quant"):
                    assert found == elsewhere.setdefault(key, found), (spec.title, key)


@every_file
def test_a_size_is_said_once(file):
    """By the caption, or by the latent that is started from."""
    for sampler in of_type(load(file), "Ideogram4QuantSampler"):
        linked = {entry["name"] for entry in sampler["inputs"] if entry["link"] is not None}
        assert linked >= {"width", "height"} or "latent" in linked
        assert value(sampler, "aspect_ratio") == "width x height"


@every_file
def test_a_shared_workflow_runs_on_any_machine(file):
    """Its files are named for the page's downloads, and the level stands in for those not here."""
    for node in of_type(load(file), "Ideogram4QuantLoad"):
        level = value(node, "level")
        assert level == AUTO or "compare" in file.stem
        named = [value(node, f"{copy}_file") for copy in ("conditional", "unconditional")]
        offered = [model["name"] for model in node["properties"].get("models", [])]
        assert [name for name in named if name != BY_LEVEL and "pocket/" not in name] == offered


@every_file
def test_every_workflow_has_a_note_in_which_gguf_files_stand_first(file):
    (note,) = of_type(load(file), "MarkdownNote")
    text = note["widgets_values"][0]
    if "models/diffusion_models" in text and "gguf" in text:
        assert 0 < text.index("gguf") < text.index(".safetensors")
    guided = of_type(load(file), "Ideogram4QuantLoad") and "8 steps" not in file.stem
    assert ("gguf" in text) == bool(guided and "try it" not in file.stem)


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


WINDOW = 1600, 900
HIDDEN = 8 / 14  # the page leaves out the nodes' text, of 14 px, where it would be drawn below 8


@every_file
def test_every_workflow_fits_a_laptop_s_window_with_its_text(file):
    """Whole in the view that is saved, between the page's bars; and where it was opened as a
    template, which the page fits into three quarters of the window."""
    workflow = load(file)
    boxes = [group_box(group) for group in workflow["groups"]]
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] for box in boxes) for i in (2, 3))
    width, height = right - left, bottom - top
    whole = min((WINDOW[0] - 120) / width, (WINDOW[1] - 170) / height)
    assert HIDDEN * 1.2 < workflow["extra"]["ds"]["scale"] <= whole
    assert min(0.75 * WINDOW[0] / width, 0.75 * WINDOW[1] / height) > HIDDEN


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
            assert model["url"] in notes or not notes
    if of_type(workflow, "Ideogram4QuantQuantize"):
        assert "models/diffusion_models" in notes


@every_file
def test_thumbnail_is_what_comes_out(file):
    """A small JPEG with the shape of pictures, not of a page."""
    picture = file.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "JPEG"
        assert image.width <= 1100
        assert np.asarray(image).std() > 1


def test_blueprint_promotes_what_one_changes():
    (file,) = (PACK / "subgraphs").glob("*.json")
    blueprint = load(file)
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    assert file.stem == node["title"] == subgraph["name"]
    promoted = [entry["label"] for entry in subgraph["inputs"]]
    assert promoted == [entry["name"] for entry in subgraph["inputs"]]  # what each look shows
    assert promoted == ["caption", "aspect_ratio", "level", "preset", "seed"]
    assert [output["type"] for output in subgraph["outputs"]] == ["IMAGE"]
    kinds = {inner["type"] for inner in subgraph["nodes"]}
    assert {"Ideogram4QuantLoad", "Ideogram4QuantCaption", "Ideogram4QuantSampler"} <= kinds
