"""From what people type to a caption: sentences, quotes, JSON, both, ratios, what is mended."""

from __future__ import annotations

import json
import random

import pytest

from ideogram4_quant.captions.check import check_caption
from ideogram4_quant.captions.compose import quoted, read_typed
from ideogram4_quant.captions.making import UNCHANGED, make_caption
from ideogram4_quant.captions.mend import CUT, NOTHING, mend, read_json
from ideogram4_quant.captions.ratio import RATIOS, SIZES, parse_ratio, picture_size
from ideogram4_quant.captions.styles import STYLES
from ideogram4_quant.errors import OpError

OWN = {
    "high_level_description": "A door",
    "compositional_deconstruction": {
        "background": "a wall",
        "elements": [{"type": "obj", "bbox": [0, 0, 500, 900], "desc": "a green door"}],
    },
}


def parsed(text: str, **picked) -> dict:
    made = make_caption(text, **picked)
    assert check_caption(made.caption).errors == []
    return json.loads(made.caption)


def elements(caption: dict) -> list[dict]:
    return caption["compositional_deconstruction"]["elements"]


def test_sentence_becomes_a_caption_in_the_trained_order():
    text = 'A poster for a jazz night, "BLUE NOTE" at the top'
    made = make_caption(text)
    verdict = check_caption(made.caption)
    assert (verdict.errors, verdict.warnings) == ([], [])
    assert verdict.caption == made.caption  # nothing to reorder
    caption = json.loads(made.caption)
    assert caption["high_level_description"] == text
    assert [(e["type"], e.get("text")) for e in elements(caption)] == [
        ("obj", None),
        ("text", "BLUE NOTE"),
    ]


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ('a sign "OPEN" and "24 h"', ["OPEN", "24 h"]),
        ("a sign “OPEN”, „ZU“ and «FERMÉ», 「開店」", ["OPEN", "ZU", "FERMÉ", "開店"]),
        ("a cup that says 'hello there'.", ["hello there"]),
        ("the dogs' bowl, it's Tom's", []),
        ("a sign that says 'don't panic'", ["don't panic"]),
        ('a 5" x 7" print', []),
        ('an unfinished "quote', []),
        ('empty "" and " "', []),
        ('"OPEN" twice: "OPEN"', ["OPEN"]),
        ('a wall with "TWO\nLINES"', ["TWO\nLINES"]),
    ],
)
def test_quoted_words(sentence: str, words: list[str]):
    assert quoted(sentence) == words


@pytest.mark.parametrize("indent", [None, 2])
def test_json_passes_unchanged_to_the_byte(indent):
    text = json.dumps(dict(reversed(OWN.items())), indent=indent)
    made = make_caption(text, style="photograph", write=lambda *_: pytest.fail("asked"))
    assert made.caption == text
    assert made.notes[0] == f"{UNCHANGED}; style and expand left out"


def test_code_fence_is_taken_off():
    made = make_caption(f"```json\n{json.dumps(OWN)}\n```")
    assert made.caption == json.dumps(OWN)
    assert any("fence" in note for note in made.notes)


def test_code_fence_with_words_around_it_is_no_words():
    caption = parsed(f"Here it is:\n```json\n{json.dumps(OWN)}\n```\nEnjoy!")
    assert caption["high_level_description"] == "Here it is: Enjoy! A door"


def test_brackets_in_a_sentence_are_text():
    for sentence in ("[Logo] a fox", '["A", "B"] on two doors', "[a {red} fox]"):
        assert read_typed(sentence).sentence == sentence


def test_json_beside_a_sentence_is_added_to():
    for text in (f'A fox, "HI" {json.dumps(OWN)}', f'{json.dumps(OWN)}\nA fox, "HI"'):
        caption = parsed(text, style="anime")
        assert caption["high_level_description"] == 'A fox, "HI" A door'
        assert elements(caption)[0] == elements(OWN)[0]
        assert elements(caption)[1]["text"] == "HI"
        assert caption["style_description"] == STYLES["anime"]


@pytest.mark.parametrize("style", STYLES)
def test_styles_follow_the_schema(style: str):
    verdict = check_caption(make_caption("a fox", style=style).caption)
    assert (verdict.errors, verdict.warnings) == ([], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the caption is empty. Type a sentence"),
        ("  \n", "the caption is empty. Type a sentence"),
        ('{"high_level_description": "a', "has JSON that cannot be read"),
        ('A fox. {"high_level_description": "a", ', "has JSON that cannot be read"),
        ('Prompt: {"compositional_deconstruction":{"elements":[1,]}}', "cannot be read"),
        ('[{"type": "text", "text": "HI"}]', "this JSON is a list"),
        ('[ {"high_level_description": "a"}]', "this JSON is a list"),
        ('[{"type": "text", "text": "HI"},', "this JSON is a list"),
        ('{"prompt": "a fox"}', "this JSON is no caption (found the keys ['prompt']"),
        ('{"compositional_deconstruction": 3}', "must be an object"),
        ('a fox {"compositional_deconstruction": 3}', "must be an object"),
        ('a fox {"compositional_deconstruction": {"elements": 3}}', "must be a list"),
        ('"high_level_description":"a","background":"b"', "lost its braces"),
    ],
)
def test_what_is_refused_says_what_to_do(text: str, said: str):
    with pytest.raises(OpError) as refused:
        make_caption(text)
    assert said in str(refused.value)


def test_braces_in_a_sentence_are_text():
    assert read_typed("a {red|blue} fox {").sentence == "a {red|blue} fox {"
    assert read_typed("x" + "{" * 50000).sentence  # soon


@pytest.mark.parametrize("ratio", ["0:3", "3:0", "7:1", "1:7", "wide", "", "-1:2", "1.5:1", None])
def test_impossible_ratios(ratio):
    with pytest.raises(OpError, match="ratio"):
        parse_ratio(ratio)


def test_ratio_of_the_caption_and_of_the_list():
    text = json.dumps({"aspect_ratio": "16:9", **OWN})
    assert make_caption(text).ratio == (16, 9)
    made = make_caption(text, ratio="1:1")
    assert made.ratio == (1, 1)
    assert "16:9" in made.notes[0]
    with pytest.raises(OpError, match="aspect"):
        make_caption(json.dumps({"aspect_ratio": "9:1", **OWN}))


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_sizes_are_what_the_model_takes(ratio: str):
    width, height = parse_ratio(ratio)
    for size in SIZES:
        wide, high = picture_size((width, height), size)
        assert wide % 16 == high % 16 == 0
        assert max(wide, high) <= 2048
        # the nearest multiples: no side is off by more than half a step
        assert abs(wide / high - width / height) < 0.6 * (1 / wide + 1 / high) * 16 * wide / high
        if size != "pocket":
            assert min(wide, high) >= 256
    assert picture_size((1, 1), "1K") == (1024, 1024)
    assert picture_size((2, 1), "pocket") == (128, 64)


WRITTEN = json.dumps(
    {
        "high_level_description": 'A \\ "fox" in snow, 開',
        "compositional_deconstruction": {
            "background": "snow",
            "elements": [
                {"type": "obj", "desc": "a red fox, [sitting]"},
                {"type": "text", "text": "HI", "desc": "red {letters}"},
            ],
        },
    },
    ensure_ascii=True,
)


def test_every_beginning_of_a_caption_is_mended():
    """A bound in tokens may cut anywhere."""
    typed = read_typed('the sentence "HI"')
    for end in range(len(WRITTEN)):
        mended = mend(WRITTEN[:end], typed)
        assert check_caption(mended.caption).errors == [], WRITTEN[:end]
        assert mended.notes[0] in (CUT, NOTHING)
        texts = [e["text"] for e in elements(json.loads(mended.caption)) if e["type"] == "text"]
        assert "HI" in " ".join(texts)
        if end > 60:  # the description is whole by then
            assert "fox" in mended.caption
    whole = mend(WRITTEN, typed)
    assert whole.notes == ()
    assert json.loads(whole.caption) == json.loads(WRITTEN)


def test_what_nobody_constrained_still_becomes_a_caption():
    typed = read_typed("a fox")
    rng = random.Random(0)
    letters = '{}[]",:\\ abc"type""desc"obj\n\x00\ud800'
    for _ in range(500):
        written = "".join(rng.choice(letters) for _ in range(rng.randrange(80)))
        caption = mend(written, typed).caption
        assert check_caption(caption).errors == []
        assert json.loads(caption.encode())
    for written in ("", "I cannot do that.", "[1]", '{"a":1}', "{" * 3000, '{"elements":' * 900):
        assert check_caption(mend(written, typed).caption).errors == []


def test_mending_is_said():
    typed = read_typed('a fox "HI"')
    fenced = f"```json\n{WRITTEN}\n```"
    assert mend(fenced, typed).notes == ()
    odd = {"background": "snow", "elements": [{"type": "obj", "desc": "fox"}, {"type": "x"}, 3]}
    mended = mend(json.dumps({"compositional_deconstruction": odd}), typed, STYLES["anime"])
    assert any("2 of its elements" in note for note in mended.notes)
    assert any("lacked description" in note for note in mended.notes)
    assert any('left out the words "HI"' in note for note in mended.notes)
    caption = json.loads(mended.caption)
    assert caption["style_description"] == STYLES["anime"]
    assert [e["type"] for e in elements(caption)] == ["obj", "text"]


def test_boxes_that_were_typed_stay_when_the_encoder_writes():
    made = make_caption(f"A fox {json.dumps(OWN)}", write=lambda sentence, ratio: WRITTEN)
    found = elements(json.loads(made.caption))
    assert found[0] == elements(OWN)[0]
    assert len(found) == 3
    kept = json.loads(made.caption)["compositional_deconstruction"]["background"]
    assert kept == "a wall"  # as typed, not as written


def test_picture_of_which_nothing_was_written():
    with pytest.raises(OpError, match="another seed"):
        make_caption("", write=lambda *_: "no", picture=True)
    assert parsed("", write=lambda *_: WRITTEN, picture=True)
    assert read_json(WRITTEN)[1]


@pytest.mark.parametrize("kind", [["obj"], {"obj": "text"}, None, 1, True, "picture"])
def test_a_type_of_any_other_kind_is_an_error_in_words_and_left_out_of_what_is_mended(kind):
    wrong = {"type": kind, "desc": "a green door"}
    text = json.dumps(
        {**OWN, "compositional_deconstruction": {"background": "x", "elements": [wrong]}}
    )
    assert 'element 1: type must be "obj" or "text", not ' in check_caption(text).text()
    with pytest.raises(OpError, match="type must be"):
        make_caption(text)
    mended = mend(text, read_typed("a door"))
    assert check_caption(mended.caption).errors == []
    assert elements(json.loads(mended.caption)) == [{"type": "obj", "desc": "a door"}]
