"""``compare`` and ``compare-merge`` on files, from the command line to what they leave."""

import json
import shutil
from pathlib import Path

import pytest

from ideogram4_quant.cli import main

CAPTIONS = ("a cat", "a dog", 'a sign "A"')


@pytest.fixture
def arguments(tiny, tmp_path):
    """What all runs share: the same files under two names, three small pictures."""
    prompts = tmp_path / "captions.txt"
    prompts.write_text("\r\n".join(CAPTIONS), encoding="utf-8-sig", newline="")
    other = tmp_path / "other.safetensors"
    shutil.copy(tiny.unconditional_file, other)
    pair = f"{tiny.conditional_file},{tiny.unconditional_file}"
    given = ["--system", f"both={pair}", "--system", f"moved={tiny.conditional_file},{other}"]
    given += ["--encoder", tiny.encoder_dir, "--vae", tiny.vae_dir, "--prompts", prompts]
    size = ["--width", 64, "--height", 32, "--preset", "turbo", "--steps", 2, "--device", "cpu"]
    return [*map(str, given + size), "--no-trajectories"]


def compare(out: Path, *arguments: str) -> int:
    return main(["compare", "--out", str(out), *arguments])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def pictures(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.glob("*/*.png")}


def test_shards_merged_score_as_one_run(arguments, tmp_path, capsys):
    shards = [tmp_path / "first", tmp_path / "second"]
    for i, folder in enumerate(shards):
        assert compare(folder, *arguments, "--shard", f"{i}/2") == 0
        assert not (folder / "results.json").exists()
    said = capsys.readouterr().out
    assert "shard 0/2" in said
    assert "left to other shards" in said
    made = [pictures(folder / "cache") for folder in shards]
    # files with the same bytes make the same pictures: each once, in one of the shards
    assert [len(shard) for shard in made] == [2, 1]
    assert not made[0].keys() & made[1].keys()

    whole = tmp_path / "whole"
    merge = ["compare-merge", str(whole / "cache"), *(str(folder / "cache") for folder in shards)]
    assert main(merge) == 0
    assert compare(whole, *arguments) == 0
    assert pictures(whole / "cache") == made[0] | made[1]  # nothing was painted again
    data = results(whole)
    assert [system["name"] for system in data["systems"]] == ["both", "moved"]
    assert data["systems"][1]["metrics"]["psnr"]["mean"] == 100.0
    assert data["systems"][0]["metrics"]["ocr_distance"]["prompts"] == 1
    assert data["settings"]["files"]["moved"][1] == "other.safetensors"
    assert any("2 of 3 pictures were not asked for text" in gap for gap in data["gaps"])
    assert any(
        g.startswith("MS-SSIM: 2 of 5 scales at 64x32 (all five from 176") for g in data["gaps"]
    )
    assert data["settings"]["pictures_at_once"] == 1
    said = "every system 1 picture at a time"
    assert all(said in (whole / n).read_text() for n in ("results.md", "report.html"))


def test_a_deleted_picture_is_made_anew(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare(out, *arguments, "--limit", "1") == 0
    (before,) = pictures(out / "cache").items()
    (file,) = (out / "cache").glob("*/*.png")
    file.write_bytes(before[1][:60])
    assert compare(out, *arguments, "--limit", "1") == 1
    said = capsys.readouterr().err
    assert f"{file}: cannot be read as a picture" in said
    assert "Delete it" in said
    file.unlink()
    assert compare(out, *arguments, "--limit", "1") == 0
    assert dict(pictures(out / "cache")) == dict([before])


def test_one_prompt_gives_no_verdict(arguments, tmp_path):
    out = tmp_path / "out"
    assert compare(out, *arguments, "--limit", "1") == 0
    data = results(out)
    cell = data["systems"][1]["metrics"]["psnr"]
    assert (cell["interval"], cell["verdict"]) == (None, None)
    assert "intervals and verdicts: too few prompts (1; 6 at least)" in data["gaps"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reference", "nobody"], "found both, moved, needed nobody"),
        (["--shard", "2/2"], "no such shard"),
        (["--shard", "1/2/3"], "not of the form I/N"),
        (["--jobs", "0"], "too few processes"),
        (["--width", "65"], "65"),
        (["--system", "third=a,b,c"], "more than two files"),
        (["--system", "third=nowhere.gguf"], "nowhere.gguf: system 'third': no such file"),
        (["--system", "both=nowhere.gguf"], "share the name 'both'"),
        (["--prompts", "captions.json"], "captions.json"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_painted(
    arguments, tmp_path, capsys, more, message
):
    assert compare(tmp_path / "out", *arguments, *more) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_merging_says_what_is_no_cache(tmp_path, capsys):
    assert main(["compare-merge", str(tmp_path / "all"), str(tmp_path / "none")]) == 1
    assert "no such cache folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare-merge", str(tmp_path / "all"), str(tmp_path / "empty")]) == 1
    assert "no picture in the cache folder" in capsys.readouterr().err
