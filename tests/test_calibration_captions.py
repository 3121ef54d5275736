"""The captions that ship for calibration: in the schema, varied, none that is evaluated on."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections import Counter

from ideogram4_quant.captions.check import check_caption
from ideogram4_quant.engine import calibration_commands
from ideogram4_quant.pocket import data
from ideogram4_quant.quant.captions import calibration_captions

CAPTIONS = calibration_captions()
READ = [json.loads(caption) for caption in CAPTIONS]
ELEMENTS = [e for c in READ for e in c["compositional_deconstruction"]["elements"]]
TEXTS = [e["text"] for e in ELEMENTS if e["type"] == "text"]


def test_there_are_128_and_they_follow_the_schema():
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 128
    for caption in CAPTIONS:
        verdict = check_caption(caption)
        assert (verdict.errors, verdict.warnings) == ([], [])
        assert verdict.caption == caption  # minified, keys in the trained order


def test_calibrate_takes_them_where_none_are_given(monkeypatch):
    """Of a model that is not the pocket one, at the size that pictures have."""
    args = argparse.Namespace(prompts=None, limit=3, width=None, height=None)
    monkeypatch.setattr(calibration_commands, "_is_pocket", lambda ck: False)
    assert calibration_commands.prompts_and_size(args, None) == (CAPTIONS[:3], (1024, 1024))
    args.limit = None
    assert calibration_commands.prompts_and_size(args, None)[0] == CAPTIONS


def test_the_first_few_are_as_many_as_asked():
    assert calibration_captions(8) == CAPTIONS[:8]


def test_none_is_evaluated():
    evaluated = [prompt.caption for prompt in data.HELD_OUT]
    assert not set(CAPTIONS) & set(evaluated)
    trained = {prompt.caption for prompt in data.prompt_batch("calibration", 64)}
    assert not set(CAPTIONS) & trained


def test_no_two_share_a_sentence():
    """No loop over a template: descriptions, backgrounds and styles are each one's own."""
    for field in ("desc", "text"):
        counts = Counter(e[field] for e in ELEMENTS if len(e.get(field, "").split()) > 5)
        assert max(counts.values()) <= 2, counts.most_common(1)
    for place in (
        lambda c: c["high_level_description"],
        lambda c: c["style_description"]["aesthetics"],
    ):
        assert len({place(c) for c in READ}) == len(READ)
    backgrounds = {c["compositional_deconstruction"]["background"] for c in READ}
    assert len(backgrounds) > 110


def test_they_vary():
    """Texts and none, boxes and none, photographs and art, many scripts, lengths and shapes."""
    kinds = Counter("photo" if "photo" in c["style_description"] else "art" for c in READ)
    assert min(kinds["photo"], kinds["art"]) > 40
    with_text = sum(any(e["type"] == "text" for e in _elements(c)) for c in READ)
    assert 60 < with_text < 110
    assert sum("bbox" not in e for e in ELEMENTS) >= 5
    assert len({c.get("aspect_ratio") for c in READ}) >= 9
    scripts = {unicodedata.name(c).split()[0] for t in TEXTS for c in t if c.isalpha()}
    wanted = {"LATIN", "CJK", "KATAKANA", "HANGUL", "ARABIC", "CYRILLIC", "DEVANAGARI", "GREEK"}
    assert wanted <= scripts
    counts = [len(_elements(c)) for c in READ]
    assert min(counts) == 1
    assert max(counts) >= 9
    assert len({c["style_description"]["medium"] for c in READ}) > 40


def _elements(caption: dict) -> list[dict]:
    return caption["compositional_deconstruction"]["elements"]
