"""The caption check: schema, key order, and what is said of plain text."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant.captions.check import check_caption, is_stripped

GOOD = {
    "high_level_description": "A sign",
    "style_description": {
        "aesthetics": "plain",
        "lighting": "even",
        "photo": "35mm",
        "medium": "photograph",
        "color_palette": ["#102030"],
    },
    "compositional_deconstruction": {
        "background": "a wall",
        "elements": [
            {"type": "obj", "bbox": [0, 0, 500, 1000], "desc": "a door"},
            {"type": "text", "bbox": [1, 2, 3, 4], "text": "OPEN", "desc": "red"},
        ],
    },
}


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_good_caption_passes_and_is_minified():
    verdict = check_caption(json.dumps(GOOD, indent=2))
    assert (verdict.errors, verdict.warnings) == ([], [])
    assert verdict.caption == json.dumps(GOOD, separators=(",", ":"))


def test_keys_are_put_into_the_trained_order():
    verdict = check_caption(json.dumps(reversed_keys(GOOD)))
    assert verdict.errors == []
    assert len(verdict.warnings) == 5  # top, style, composition, two elements
    assert verdict.caption == json.dumps(GOOD, separators=(",", ":"))


def test_drawings_have_their_medium_before_the_style():
    style = {"art_style": "ink", "medium": "drawing", "lighting": "flat", "aesthetics": "bold"}
    verdict = check_caption(json.dumps(GOOD | {"style_description": style}))
    order = list(json.loads(verdict.caption)["style_description"])
    assert order == ["aesthetics", "lighting", "medium", "art_style"]


def test_words_of_other_scripts_stay_readable():
    caption = json.dumps(GOOD | {"high_level_description": "Ein Schild: café, 開"})
    assert "café, 開" in check_caption(caption).caption


def test_plain_text_is_warned_about_and_kept():
    verdict = check_caption("a cat on a mat")
    assert verdict.errors == []
    assert "JSON" in verdict.warnings[0]
    assert verdict.caption == "a cat on a mat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compositional_deconstruction": None}, "must be an object"),
        ({"compositional_deconstruction": {"elements": []}}, "lacks background"),
        ({"compositional_deconstruction": {"background": "", "elements": {}}}, "must be a list"),
        ({"style_description": "bold"}, "must be an object"),
        ({"high_level_description": 3}, "must be text"),
    ],
)
def test_wrong_structure_is_an_error(change, message):
    found = check_caption(json.dumps({**GOOD, **change}))
    assert any(message in error for error in found.errors)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"type": "object", "desc": "x"}, 'not "object"'),
        ({"type": "text", "desc": "x"}, "lacks text"),
        ({"type": "text", "text": " ", "desc": "x"}, "empty"),
        ({"type": "obj", "desc": "x", "bbox": [0, 0, 5]}, "four numbers"),
        ({"type": "obj", "desc": "x", "bbox": [0, 0, 5, 1001]}, "within 0 and 1000"),
        ({"type": "obj", "desc": "x", "bbox": [9, 0, 5, 10]}, "bbox is empty"),
        ("x", "must be an object"),
    ],
)
def test_wrong_element_is_named_by_its_number(element, message):
    composition = {"background": "b", "elements": [GOOD_ELEMENT, element]}
    errors = check_caption(json.dumps({"compositional_deconstruction": composition})).errors
    assert any(error.startswith("element 2") and message in error for error in errors)


GOOD_ELEMENT = {"type": "obj", "desc": "a door"}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[]", "[" * 100_000])
def test_unreadable_captions_are_errors(text):
    verdict = check_caption(text)
    assert verdict.errors
    assert verdict.caption == text


@pytest.mark.parametrize(
    "typed",
    [
        '"high_level_description":"A sign","compositional_deconstruction":"background":"a wall"',
        '"compositional_deconstruction": "background": "a page of https:',
    ],
    ids=["braces", "braces and //"],
)
def test_json_that_lost_its_braces_to_the_page_is_an_error_that_says_where_to_type(typed):
    (error,) = check_caption(typed).errors
    assert "without its braces" in error
    assert "Caption (Ideogram 4)" in error


@pytest.mark.parametrize("text", ["A sign: OPEN", json.dumps(GOOD), "a high_level_description"])
def test_other_captions_have_their_braces(text):
    assert not is_stripped(text)


@pytest.mark.parametrize("around", ["```json\n%s\n```", "```%s```", "\ufeff%s"])
def test_what_programs_put_around_json_is_taken_off(around):
    """It was said to have lost its braces to ComfyUI's page."""
    text = around % json.dumps(GOOD)
    assert not is_stripped(text)
    verdict = check_caption(text)
    assert verdict.errors == []
    assert json.loads(verdict.caption) == GOOD
    assert ("fence" in verdict.text()) == around.startswith("`")


def test_json_behind_other_text_has_its_braces():
    text = "Here is the caption: " + json.dumps(GOOD)
    assert not is_stripped(text)
    assert "plain text" in check_caption(text).text()
