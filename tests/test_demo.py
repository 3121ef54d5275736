"""The demo on a small random model, with a reader that is told what to say."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from ideogram4_quant import cli
from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine import demo
from ideogram4_quant.engine.sheet import Row, contact_sheet
from ideogram4_quant.errors import CheckpointError, OpError


@dataclass
class Word:
    word: str
    seed: int
    width: int = 128
    height: int = 64

    @property
    def caption(self):
        return json.dumps({"text": self.word})


class Script:
    """Reads the words of a list, in order."""

    def __init__(self, words):
        self.words = iter(words)

    def read(self, image):
        assert image.size == (128, 64)
        return next(self.words)


LEVELS = ("BF16", "INT8 W8A8", "INT8 W8A8 rotated", "Q8_0", "Q4_K")


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    prompts = [Word("HELLO", 1), Word("SALE", 2)]
    inputs = demo.Inputs(
        tiny.conditional_file, tiny.unconditional_file, tiny.encoder_dir, tiny.vae_dir, prompts
    )
    read = ["HELLO", "SALE", "HELLO", "SALT", "HELLO", "SALE", "HELLO", "SALE", "", "SAL E"]
    report = demo.run(out, inputs, preset="turbo", reader=Script(read))
    return out, report, read


def test_report(result):
    out, report, _ = result
    assert json.loads((out / "report.json").read_text()) == report
    levels = {row["level"]: row for row in report["levels"]}
    assert tuple(levels) == LEVELS
    assert {k: row["words_right"] for k, row in levels.items()} == dict(
        zip(LEVELS, [2, 1, 2, 2, 0], strict=True)
    )
    assert {row["words"] for row in levels.values()} == {2}
    assert all(row["seconds"] > 0 for row in levels.values())
    assert levels["BF16"]["psnr"] is None
    sizes = [levels[k]["bytes"] for k in ("Q4_K", "INT8 W8A8", "Q8_0", "BF16")]
    assert sizes == sorted(sizes)
    assert levels["Q8_0"]["psnr"] > levels["Q4_K"]["psnr"] > 10
    assert levels["Q8_0"]["psnr"] > levels["INT8 W8A8"]["psnr"] > 10


def test_files_are_the_levels(result):
    out, report, _ = result
    for level in LEVELS[1:]:
        suffix = "gguf" if level in ("Q8_0", "Q4_K") else "safetensors"
        files = []
        for copy in ("conditional", "unconditional"):
            files.append(out / "models" / f"pocket-{demo.slug(level)}-{copy}.{suffix}")
            checkpoint = open_checkpoint(files[-1])
            assert checkpoint.level == level
            assert checkpoint.copies == (copy,)
        row = next(r for r in report["levels"] if r["level"] == level)
        assert row["bytes"] == sum(f.stat().st_size for f in files)


def test_pictures(result):
    out, report, read = result
    assert [p["read"] for p in report["pictures"]] == read
    for level in LEVELS:
        folder = out / "pictures" / demo.slug(level)
        assert sorted(f.name for f in folder.iterdir()) == ["01-hello.png", "02-sale.png"]
        for file in folder.iterdir():
            with Image.open(file) as image:
                assert image.size == (128, 64)
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 2 * 256
        assert sheet.height > 5 * 128


def test_running_again_replaces(tiny, result):
    out, report, read = result
    prompts = [Word("HELLO", 1), Word("SALE", 2)]
    inputs = demo.Inputs(
        tiny.conditional_file, tiny.unconditional_file, tiny.encoder_dir, tiny.vae_dir, prompts
    )
    again = demo.run(out, inputs, levels=("BF16", "Q8_0"), preset="turbo", reader=Script(read))
    assert again["levels"][1]["psnr"] == next(
        row["psnr"] for row in report["levels"] if row["level"] == "Q8_0"
    )


def test_contact_sheet_places_every_picture():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [Image.new("RGB", (32, 16), colour) for colour in colours]
    sheet = contact_sheet(
        [Row("a", ["x"], pictures[:2], ["", ""]), Row("b", [], pictures[2:], ["wrong", ""])],
        ["one", "two"],
    )
    pixels = np.asarray(sheet)
    for colour in colours:
        found = np.argwhere((pixels == colour).all(-1))
        height, width = found.max(0) - found.min(0) + 1
        assert (width, height) == (256, 128)
        assert len(found) == width * height


def test_prompts_out_of_range():
    with pytest.raises(OpError, match="number of prompts"):
        demo.pocket_inputs(0)


def test_missing_pocket_weights_are_named(monkeypatch, tmp_path):
    from ideogram4_quant.pocket import paths

    monkeypatch.setattr(paths, "dit_path", lambda copy: tmp_path / f"{copy}.safetensors")
    with pytest.raises(CheckpointError, match=r"cond\.safetensors: a part of the pocket model"):
        demo.pocket_inputs(1)


@pytest.mark.slow
def test_the_demo_command_reads_the_pockets_words(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), "--prompts", "8"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds_in_all"] < 300
    levels = {row["level"]: row for row in report["levels"]}
    assert levels["BF16"]["words_right"] >= 7
    assert levels["Q8_0"]["words_right"] >= 7
    assert levels["Q8_0"]["psnr"] > levels["Q4_K"]["psnr"]
    table = capsys.readouterr().out
    for level in LEVELS:
        assert f"\n{level}  " in table
