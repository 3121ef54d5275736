"""Compare levels without the host: batches and folders in, a sheet and a table out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ideogram4_quant.engine.compare.cases import Case
from ideogram4_quant.engine.compare.sheet import label
from ideogram4_quant.engine.sheet import Row, contact_sheet
from ideogram4_quant.errors import Ideogram4QuantError
from ideogram4_quant.nodes import compare

CAPTION = json.dumps(
    {"compositional_deconstruction": {"elements": [{"type": "text", "text": "HI"}]}}
)


def batch(noise: float, count: int = 3, size=(48, 96), seed: int = 0) -> torch.Tensor:
    ramp = (
        torch.linspace(0, 1, size[1]).expand(count, size[0], size[1])[..., None].repeat(1, 1, 1, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    return (ramp + noise * torch.randn(ramp.shape, generator=generator)).clamp(0, 1)


def rows(table: str) -> dict[str, list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_first_it_says_in_words_how_far_each_level_strays():
    """From 128 to 153 of 255 everywhere, 9.8 % and 20 log10(255 / 25) dB; and not at all."""
    grey = torch.full((2, 32, 48, 3), 0.5)
    _, table = compare.compare_levels([grey, grey + 0.1, grey], ["full", "INT8", "BF16"], {})
    first, second, *_ = table.split("\n\n")
    assert first == "INT8 strays from full by 9.8 % of full brightness (PSNR 20.2 dB)."
    assert second == "BF16: the same pixels as full."


def test_batches_are_measured_against_the_first():
    sheet, table = compare.compare_levels([batch(0), batch(0.01), batch(0.1)], ["full", "INT8"], {})
    assert sheet.ndim == 4
    assert sheet.shape[0] == 1
    assert 0 <= sheet.min() <= sheet.max() <= 1
    found = rows(table)
    assert list(found) == ["system", "---", "**full** (reference)", "INT8", "level 3"]
    assert found["system"][0] == "PSNR (dB)"  # no empty columns for level and size
    near, far = (float(found[name][0].split()[0]) for name in ("INT8", "level 3"))
    assert near == pytest.approx(40, abs=1.5)
    assert far == pytest.approx(20, abs=1.5)
    assert "no prompt asks for text" in table


def test_differences_are_a_second_sheet():
    sheet, _ = compare.compare_levels([batch(0), batch(0.1)], [], {}, differences=True)
    assert sheet.shape[0] == 2
    assert not torch.equal(sheet[0], sheet[1])


def test_a_short_batch_leaves_a_marked_gap():
    _, table = compare.compare_levels([batch(0), batch(0.1, count=2)], ["a", "b"], {})
    assert "gap: b: 1 of 3 pictures missing" in table


def test_without_torchmetrics_ssim_is_a_gap_that_says_what_to_install(monkeypatch):
    from ideogram4_quant.engine.compare import score

    lacking = {"ssim": "torchmetrics", "ms_ssim": "torchmetrics", "ocr_exact": "rapidfuzz"}
    monkeypatch.setattr(score, "missing_packages", lambda: lacking)
    _, table = compare.compare_levels([batch(0), batch(0.1)], ["a", "b"], {}, [CAPTION])
    assert rows(table)["system"] == ["PSNR (dB)"]
    assert "SSIM: needs torchmetrics (pip install torchmetrics)" in table


def test_without_rapidocr_the_text_metrics_are_a_gap(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    _, table = compare.compare_levels([batch(0), batch(0.1)], ["a", "b"], {}, [CAPTION])
    assert "text metrics: Reading words needs rapidocr" in table
    assert "words read" not in rows(table)["system"]


@pytest.mark.parametrize(
    ("batches", "names", "captions", "message"),
    [
        ([], [], [], "nothing to compare"),
        ([0], [], [], "one level alone"),
        ([0, 0], ["a", "b", "c"], [], "more names than levels"),
        ([0, 0], ["a", "a"], [], "share a name"),
        ([0, 0], [], ["x", "y"], "2 captions"),
    ],
)
def test_bad_inputs_say_what_is_wrong(batches, names, captions, message):
    with pytest.raises(Ideogram4QuantError, match=message):
        compare.compare_levels([batch(n) for n in batches], names, {}, captions)


def test_pictures_of_other_sizes_name_the_level_and_both_sizes():
    other = batch(0, size=(32, 32))
    with pytest.raises(Ideogram4QuantError, match=r"small.*32x32.*96x48"):
        compare.compare_levels([batch(0), other], ["full", "small"], {})


def test_folders_below_output_are_compared(tmp_path):
    for name, level in (("one", 120), ("two", 130)):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture = Image.new("RGB", (64, 32), (level + 10 * i,) * 3)
            picture.save(tmp_path / name / f"p_{i}.png")
    folders = compare.read_folders("first = one\n\n second=two \n", tmp_path)
    assert folders == {"first": tmp_path / "one", "second": tmp_path / "two"}
    _, table = compare.compare_levels([], [], folders)
    assert float(rows(table)["second"][0].split()[0]) == pytest.approx(28.13, abs=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one", "name = folder"),
        ("a = ../elsewhere", "outside"),
        ("a = /etc", "outside"),
        ("a = x\na = y", "share a name"),
    ],
)
def test_folders_that_are_refused(tmp_path, text, message):
    with pytest.raises(Ideogram4QuantError, match=message):
        compare.read_folders(text, tmp_path)


def test_captions_are_one_json_or_one_a_line():
    spread = json.dumps(json.loads(CAPTION), indent=2)
    assert compare.read_captions(spread) == [spread]
    assert compare.read_captions(f"{CAPTION}\n{CAPTION}\n") == [CAPTION, CAPTION]
    assert compare.read_captions('a sign "HI"') == ['a sign "HI"']
    assert compare.read_captions(" \n") == []


@pytest.mark.parametrize(
    ("prompt", "text", "wanted"),
    [
        ('{"high_level_description":"A fox  in\\nsnow.","x":1}', None, "A fox in snow."),
        ('{"compositional_deconstruction":{}}', "HELLO", "HELLO"),
        ("A red fox", "FOX", "A red fox"),
        ("picture 2", None, "picture 2"),
        ("word " * 40, None, ("word " * 40)[:89].rstrip() + "…"),
        ("[1, 2", None, "[1, 2"),
    ],
)
def test_rows_are_labelled_by_their_caption(prompt, text, wanted):
    assert label(Case(prompt, 0, 64, 64, text=text)) == wanted


def test_a_long_label_takes_several_lines_and_pushes_the_rest_down():
    """The rows of text ink left of the pictures, counted as bands."""
    picture = Image.new("RGB", (256, 256), "red")

    def bands(title: str) -> int:
        sheet = contact_sheet([Row(title, ["seed 1"], [picture], [""])], ["one"])
        ink = (np.asarray(sheet)[40:, :240] < 128).all(-1).any(-1)
        return int((np.diff(ink.astype(int)) == 1).sum() + ink[0])

    assert bands("short") == 2
    assert bands("a label that is much too long for one line of it and for two lines as well") >= 4
