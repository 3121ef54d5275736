"""The node Caption in a real ComfyUI: what it makes, what it shows, what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ideogram4_quant.captions.check import check_caption
from ideogram4_quant.tests.host import graphs
from ideogram4_quant.tests.host.graphs import node
from ideogram4_quant.tests.host.runs import fails_with, picture, rejected_with
from ideogram4_quant.tests.tiny_writer import write_tiny_writer

pytestmark = pytest.mark.host
SENTENCE = 'a fox beside a sign "OPEN"'
POCKET = {"size": "pocket", "aspect_ratio": "2:1"}


@pytest.fixture(scope="module")
def encoders(models, tmp_path_factory):
    """Names of a tiny encoder that writes and sees, and of one that does neither."""
    files = write_tiny_writer(tmp_path_factory.mktemp("writer") / "files")
    places = {name: models / "text_encoders" / f"tiny_{name}" for name in ("whole", "headless")}
    for name, place in places.items():
        shutil.copytree(getattr(files, name), place)
    yield {name: f"{place.name}/model.safetensors" for name, place in places.items()}
    for place in places.values():
        shutil.rmtree(place)


def captioned(text, encoder: str = graphs.ENCODER, **settings) -> dict:
    """A caption that is shown, and read by another node."""
    loaded = {} if encoder is None else {"clip": ("encoder", 0)}
    inputs = {"aspect_ratio": "as in the caption", "size": "1K", "style": "as the text says"}
    inputs |= {"expand": False, "seed": 0, **loaded, **settings}
    found = {
        "caption": node("Ideogram4QuantCaption", text=text, **inputs),
        "read": node("PreviewAny", source=("caption", 1)),
        "wide": node("PreviewAny", source=("caption", 2)),
        "high": node("PreviewAny", source=("caption", 3)),
    }
    if encoder is not None:
        found["encoder"] = node("Ideogram4QuantLoadEncoder", encoder=encoder)
    return found


def texts(run, *names: str) -> list[str]:
    assert run.status == "success", run.error
    return [run.outputs[name]["text"][0] for name in names]


def test_one_text_box_makes_the_picture_of_two_nodes(server):
    """Its conditioning, width and height, against CLIP Text Encode and a size that is typed."""
    wanted = picture(server, server.run(graphs.with_sampler("two", seed=5)))
    graph = graphs.with_sampler("one", seed=5)
    graph["positive"] = captioned(graphs.CAPTION, **POCKET)["caption"]
    graph["sampled"]["inputs"] |= {"width": ["positive", 2], "height": ["positive", 3]}
    assert np.array_equal(picture(server, server.run(graph)), wanted)


def test_sentence_is_shown_as_a_caption(server):
    run = server.run(captioned(SENTENCE, encoder=None, aspect_ratio="3:2", style="poster"))
    shown, caption, wide, high = texts(run, "caption", "read", "wide", "high")
    assert check_caption(caption).errors == []
    assert json.loads(caption)["style_description"]["medium"] == "graphic_design"
    assert (wide, high) == ("1248", "832")
    assert caption in shown
    assert "1248 x 832 px" in shown


def test_a_sentence_for_the_test_model_is_told_that_it_paints_none(server):
    shown, no_sentence = (
        texts(server.run(captioned(text, **POCKET)), "caption")[0]
        for text in (SENTENCE, graphs.CAPTION)
    )
    assert "paints one word of 3 to 6 capitals" in shown
    assert "capitals" not in no_sentence
    (shown,) = texts(server.run(captioned(SENTENCE, size="1K")), "caption")  # by its encoder
    assert "paints one word of 3 to 6 capitals" in shown


def test_json_that_passes_was_written_with_nothing(server):
    (shown,) = texts(server.run(captioned(graphs.CAPTION, expand=True)), "caption")
    assert "expand left out" in shown
    assert "Written" not in shown


def test_json_and_dictionaries_pass(server):
    for text in (graphs.CAPTION, f" {graphs.CAPTION}\n"):
        (caption,) = texts(server.run(captioned(text, encoder=None)), "read")
        assert caption == text


def test_encoder_writes_a_caption_again_at_the_same_seed(server, encoders):
    settings = {"expand": True, "max_tokens": 64, "encoder": encoders["whole"]}
    found = []
    for seed in (1, 2, 1):
        run = server.run(captioned(SENTENCE, seed=seed, **settings, style="anime"))
        shown, caption = texts(run, "caption", "read")
        assert check_caption(caption).errors == []
        assert "OPEN" in [e.get("text") for e in _elements(caption)]
        assert "Written with head" in shown
        found.append(caption)
    assert found[0] == found[2]


def _elements(caption: str) -> list:
    return json.loads(caption)["compositional_deconstruction"]["elements"]


def test_generate_text_writes_or_says_which_file_has_a_head(server, encoders):
    def graph(encoder: str) -> dict:
        return {
            "encoder": node("Ideogram4QuantLoadEncoder", encoder=encoder),
            "written": node(
                "TextGenerate",
                **{"clip": ("encoder", 0), "prompt": "hello", "max_length": 9},
                **{"sampling_mode": "off", "thinking": False, "use_default_template": True},
            ),
            "read": node("PreviewAny", source=("written", 0)),
        }

    (written,) = texts(server.run(graph(encoders["whole"])), "read")
    assert written.strip()
    fails_with(server, graph(encoders["headless"]), "no head", "qwen3-vl-8b-instruct-lm-head")


@pytest.mark.parametrize("text", ["", "   "])
def test_empty_caption(server, text: str):
    fails_with(server, captioned(text, encoder=None), "the caption is empty", "Type a sentence")


def test_too_long_a_caption(server):
    fails_with(server, captioned("word " * 3000), "too long", "2048", "Shorten")


def test_impossible_ratio(server):
    for stated, said in (("0:1", "no aspect ratio"), ("9:1", "beyond")):
        text = json.dumps({"aspect_ratio": stated, **json.loads(graphs.CAPTION)})
        fails_with(server, captioned(text, encoder=None), said, "Pick one in the list")
    rejected_with(server, captioned(SENTENCE, encoder=None, aspect_ratio="0:1"), "aspect_ratio")


def test_expand_without_what_it_needs(server, encoders):
    asked = {"expand": True, "max_tokens": 64}
    fails_with(server, captioned(SENTENCE, encoder=None, **asked), "Connect", "expand off")
    headless = captioned(SENTENCE, encoder=encoders["headless"], **asked)
    fails_with(server, headless, "no head", "models/text_encoders")
    shown = {"image": ("loaded", 0)}
    blank = {"loaded": node("EmptyImage", width=64, height=64, batch_size=1, color=255)}
    looking = captioned("", encoder=encoders["headless"], **asked, **shown) | blank
    fails_with(server, looking, "no head")


def test_picture_is_described(server, encoders):
    blank = {"loaded": node("EmptyImage", width=64, height=64, batch_size=2, color=255)}
    settings = {"encoder": encoders["whole"], "max_tokens": 64, "image": ("loaded", 0)}
    run = server.run(captioned("make it red", expand=True, **settings) | blank)
    shown, caption = texts(run, "caption", "read")
    assert check_caption(caption).errors == []
    assert "vision" in shown
    (shown,) = texts(server.run(captioned("a fox", **settings) | blank), "caption")
    assert "expand is off" in shown


def test_conditioning_without_an_encoder_is_an_error_that_says_so(server):
    graph = graphs.with_sampler("none")
    graph["positive"] = captioned(SENTENCE, encoder=None, **POCKET)["caption"]
    fails_with(server, graph, "there is no encoder", "Connect")
