"""Comparing pictures that are already rendered, from the command line to the files it leaves."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ideogram4_quant.engine.compare import cli
from ideogram4_quant.engine.compare.cases import CompareError
from ideogram4_quant.engine.pictures import PictureError

WORDS = ("HELLO", "OPEN", "SALE", "EXIT")


def caption(word: str) -> str:
    elements = [{"type": "text", "text": word, "desc": "black"}]
    return json.dumps({"compositional_deconstruction": {"elements": elements}})


def sign(word: str, noise: float, seed: int) -> Image.Image:
    from PIL import ImageFont

    image = Image.new("RGB", (192, 96), "white")
    ImageDraw.Draw(image).text((20, 24), word, font=ImageFont.load_default(40), fill="black")
    pixels = np.asarray(image, dtype=np.float64)
    pixels = pixels + noise * np.random.default_rng(seed).standard_normal(pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def folders(tmp_path):
    for name, noise in (("reference", 0.0), ("good", 2.0), ("bad", 30.0)):
        (tmp_path / name).mkdir()
        for i, word in enumerate(WORDS):
            sign(word, noise, i).save(tmp_path / name / f"{word.lower()}.png")
    captions = {word.lower(): caption(word) for word in WORDS}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parsers(parser.add_subparsers())
    args = parser.parse_args(["compare", *map(str, arguments)])
    return args.func(args)


def named(folders, *names):
    return [part for name in names for part in ("--pictures", f"{name}={folders / name}")]


def test_folders_give_every_file_and_order_the_levels(folders, capsys):
    out = folders / "out"
    given = [*named(folders, "reference", "good", "bad"), "--captions", folders / "captions.json"]
    assert run("--out", out, *given, "--differences") == 0
    names = {f.name for f in out.iterdir()}
    assert names == {
        "results.json", "results.md", "results.csv", "report.html", "contact-sheet.png",
        "differences.png",
    }  # fmt: skip
    data = json.loads((out / "results.json").read_text())
    good, bad = data["systems"][1]["metrics"], data["systems"][2]["metrics"]
    assert good["psnr"]["mean"] > 35 > 25 > bad["psnr"]["mean"]
    assert good["ssim"]["mean"] > bad["ssim"]["mean"]
    assert data["systems"][0]["metrics"]["psnr"] is None  # the reference has no distance to itself
    assert data["systems"][0]["metrics"]["ocr_exact"]["mean"] == 1.0
    assert good["ocr_exact"]["verdict"] is None  # fewer than six prompts
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 3 * len(WORDS)
    assert "**reference** (reference)" in capsys.readouterr().out


def test_without_captions_the_text_metrics_are_a_marked_gap(folders):
    out = folders / "out"
    run("--out", out, *named(folders, "reference", "good"))
    data = json.loads((out / "results.json").read_text())
    assert "ocr_exact" not in data["systems"][0]["metrics"]
    assert any("no prompt asks for text" in gap for gap in data["gaps"])


def test_a_missing_picture_is_a_marked_gap(folders):
    (folders / "bad" / "exit.png").unlink()
    sign("MORE", 0, 9).save(folders / "bad" / "more.png")
    out = folders / "out"
    run("--out", out, *named(folders, "reference", "bad"))
    data = json.loads((out / "results.json").read_text())
    assert len(data["cases"]) == len(WORDS)
    assert len(data["systems"][1]["scores"]["psnr"]) == len(WORDS) - 1
    assert any("bad: 1 of 4 pictures missing" in gap for gap in data["gaps"])
    assert any("bad: 1 pictures left out" in gap for gap in data["gaps"])
    assert "no picture" in (out / "report.html").read_text()


def test_seeds_of_one_prompt_are_one_unit(folders):
    same = dict.fromkeys((w.lower() for w in WORDS[:2]), caption("HELLO"))
    captions = same | {f"{w.lower()}.png": json.loads(caption(w)) for w in WORDS[2:]}
    (folders / "captions.json").write_text(json.dumps(captions))
    out = folders / "out"
    given = [*named(folders, "reference", "good"), "--captions", folders / "captions.json"]
    run("--out", out, *given)
    data = json.loads((out / "results.json").read_text())
    assert [c["seed"] for c in data["cases"]] == [0, 0, 1, 0]  # exit, hello, open, sale
    assert data["systems"][1]["metrics"]["psnr"]["prompts"] == 3
    assert data["cases"][3]["text"] == "SALE"


def test_a_missing_package_is_a_gap_with_a_way_out(folders, monkeypatch):
    from ideogram4_quant.engine.compare import score

    lacking = {"ssim": "torchmetrics", "ocr_exact": "rapidfuzz"}
    monkeypatch.setattr(score, "missing_packages", lambda: lacking)
    out = folders / "out"
    given = [*named(folders, "reference", "good"), "--captions", folders / "captions.json"]
    run("--out", out, *given)
    data = json.loads((out / "results.json").read_text())
    assert data["systems"][1]["metrics"].keys() == {"psnr", "ms_ssim"}
    assert "SSIM: needs torchmetrics (pip install torchmetrics)" in data["gaps"]
    assert "words read: needs rapidfuzz (pip install rapidfuzz)" in data["gaps"]


def test_sizes_that_differ_name_both(folders):
    Image.new("RGB", (64, 64)).save(folders / "bad" / "exit.png")
    with pytest.raises(CompareError, match=r"bad.*64x64.*192x96"):
        run("--out", folders / "out", *named(folders, "reference", "bad"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --system"),
        (["--pictures", "a"], "NAME=PATH"),
        (["--pictures", "a=.", "--pictures", "a=.."], "share a name"),
        (["--pictures", "a=/nowhere/at/all"], "no folder"),
        (["--system", "a=/nowhere/at/all"], "needs --prompts"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tmp_path, arguments, message):
    with pytest.raises(CompareError, match=message):
        run("--out", tmp_path / "out", *arguments)


@pytest.mark.parametrize("level", ["reference", "bad"])
def test_a_damaged_picture_is_named(folders, level):
    file = folders / level / "exit.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(PictureError, match=rf"{level}.exit\.png: cannot be read as a picture"):
        run("--out", folders / "out", *named(folders, "reference", "bad"))


def test_suffixes_may_be_in_capitals_and_differ_between_levels(folders):
    (folders / "reference" / "exit.png").rename(folders / "reference" / "exit.PNG")
    sign("HELLO", 0, 0).save(folders / "good" / "hello.webp")
    with pytest.raises(CompareError, match=r"two pictures of one name.*hello\.png, hello\.webp"):
        run("--out", folders / "out", *named(folders, "reference", "good"))
    (folders / "good" / "hello.png").unlink()
    run("--out", folders / "out", *named(folders, "reference", "good"))
    data = json.loads((folders / "out" / "results.json").read_text())
    assert len(data["systems"][1]["scores"]["psnr"]) == len(WORDS)


def test_large_pictures_are_reduced_in_the_page_and_long_words_cut(tmp_path, monkeypatch):
    from ideogram4_quant.engine.compare import score

    monkeypatch.setattr(score, "word_reader", lambda cases, notes: None)
    for name in ("reference", "other"):
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(len(name)).integers(0, 256, (420, 560, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name / "one.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({"one.jpg": caption("LONG\nWORDS " * 30)}))
    given = [*named(tmp_path, "reference", "other"), "--captions", tmp_path / "captions.json"]
    assert run("--out", tmp_path / "out", *given) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("src='data:image/webp;base64,") == 2
    assert "width=560 height=420" in page
    assert len(page) < 1_000_000


def test_an_empty_folder_and_foreign_names_are_errors(folders):
    (folders / "empty").mkdir()
    with pytest.raises(CompareError, match="no picture"):
        run("--out", folders / "out", *named(folders, "reference", "empty"))
    (folders / "other").mkdir()
    sign("HELLO", 0, 0).save(folders / "other" / "else.png")
    with pytest.raises(CompareError, match="shares no file name"):
        run("--out", folders / "out", *named(folders, "reference", "other"))


def test_an_unknown_reference_names_the_systems(folders):
    with pytest.raises(CompareError, match=r"reference, good.*nobody"):
        run("--out", folders / "out", *named(folders, "reference", "good"),
            "--reference", "nobody")  # fmt: skip
