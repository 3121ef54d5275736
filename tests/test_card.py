"""The command ``card``: stages that fail in every way there is, and the file."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ideogram4_quant import cli
from ideogram4_quant.diagnostics.card import cli as card
from ideogram4_quant.diagnostics.card import document, supervise
from ideogram4_quant.diagnostics.card.supervise import Stage
from ideogram4_quant.errors import Ideogram4QuantError

PACKAGE = "ideogram4_quant.tests"


def stage(name: str, seconds: float = 10.0) -> Stage:
    return Stage(name, seconds, f"card_stages:{name}", PACKAGE)


def run(path: Path, *stages: Stage, **limits: float) -> tuple[int, dict]:
    code = card.measure(path, "cpu", reduced=True, stages=stages, **limits)
    return code, document.load(path)


def by_name(found: dict) -> dict[str, dict]:
    return {entry["name"]: entry for entry in found["stages"]}


# ---- failures


def test_a_stage_that_fails_takes_no_other_with_it(tmp_path):
    names = ("raising", "out_of_memory", "unimportable", "aborting", "good")
    code, found = run(tmp_path / "a.json", *map(stage, names))
    assert code == 1
    assert found["finished"]
    stages = by_name(found)
    assert {name: stages[name]["status"] for name in names} == {
        **dict.fromkeys(names, "failed"),
        "good": "ok",
    }
    assert "ValueError: an illegal instruction" in stages["raising"]["note"]
    assert "CUDA out of memory. Tried to allocate 9.00 GiB" in stages["out_of_memory"]["note"]
    assert "no_such_module" in stages["unimportable"]["note"]
    assert "signal 9" in stages["aborting"]["note"]
    # what was measured before the failure stays
    assert stages["raising"]["rows"] == stages["aborting"]["rows"] == [{"what": "before"}]


def test_a_process_that_failed_measures_nothing_more(tmp_path):
    stages = [stage("good"), stage("good"), stage("raising"), stage("good")]
    _, found = run(tmp_path / "a.json", *stages)
    ids = [row["id"] for s in found["stages"] for row in s["rows"] if "id" in row]
    assert ids[0] == ids[1] != ids[2]


def test_later_stages_know_the_ceilings_of_earlier_ones_also_in_a_new_process(tmp_path):
    _, found = run(tmp_path / "a.json", stage("good"), stage("raising"), stage("good"))
    assert [s["rows"][1]["rate"] for s in found["stages"] if len(s["rows"]) > 1] == [None, 5.0]


def test_a_stage_that_hangs_is_ended_and_one_that_looks_at_the_clock_ends_itself(tmp_path):
    started = time.monotonic()
    stages = stage("hanging", 0.2), stage("slow_but_polite", 0.3), stage("good")
    code, found = run(tmp_path / "a.json", *stages, grace=0.3)
    assert time.monotonic() - started < 20
    assert code == 1
    hanging, polite, good = found["stages"]
    assert hanging["status"] == "stopped"
    assert hanging["rows"] == [{"what": "before"}]
    assert polite["status"] == "partly"
    assert polite["note"].startswith("not measured: part ")
    assert len(polite["rows"]) >= 2
    assert good["status"] == "ok"


def test_the_whole_run_ends_in_time_and_says_what_it_left_out(tmp_path):
    started = time.monotonic()
    stages = [stage("slow_but_polite", 60), stage("good"), stage("good")]
    code, found = run(tmp_path / "a.json", *stages, total=3.0, grace=0.4)
    assert time.monotonic() - started < 8
    assert code == 0  # nothing broke
    assert [s["status"] for s in found["stages"]] == ["partly", "not run", "not run"]
    assert "the time of the whole run is over" in found["stages"][2]["note"]


def test_the_budgets_leave_room_within_six_minutes():
    assert supervise.TOTAL + supervise._GRACE < 360
    assert sum(s.seconds for s in card.STAGES) + supervise._GRACE <= supervise.TOTAL + 30


def test_a_run_killed_half_way_leaves_a_whole_file_and_no_process(tmp_path):
    path = tmp_path / "a.json"
    code = (
        "from pathlib import Path\n"
        "from ideogram4_quant.tests.test_card import run, stage\n"
        f"run(Path({str(path)!r}), stage('good'), stage('hanging', 100))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        end = time.monotonic() + 60
        while not path.exists() or document.load(path)["stages"][1]["status"] != "running":
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    found = document.load(path)
    assert not found["finished"]
    assert [s["status"] for s in found["stages"]] == ["ok", "running"]
    worker = found["stages"][0]["rows"][1]["id"]
    end = time.monotonic() + 20
    while _is_alive(worker):
        assert time.monotonic() < end, "the measuring process outlived the command"
        time.sleep(0.05)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, FileNotFoundError):
        return False


# ---- the file


def test_nothing_personal_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "annas-desktop.lan")
    text = "on annas-desktop, of anna-maria, int8/bf16 at 3.5"
    monkeypatch.setenv("CARD_TEST_TEXT", text)
    monkeypatch.setattr(document.getpass, "getuser", lambda: "anna-maria")
    _, found = run(tmp_path / "a.json", stage("personal"), stage("raising"))
    text = (tmp_path / "a.json").read_text()
    for part in ("someone", "secret", "/srv", "anna", str(tmp_path)):
        assert part not in text
    assert found["stages"][0]["rows"][0]["text"].endswith("int8/bf16 at 3.5")
    assert "kernel.py:12" in found["stages"][1]["note"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"in C:\Users\Some One\x\kernel.py", "in kernel.py"),
        ("/srv/some.one/cache/x.so, line 2", "x.so, line 2"),
        ("/usr/lib/a.so: not found", "a.so: not found"),
        ("tokens/s and 1/2", "tokens/s and 1/2"),
        (r"\\server\share\file.txt", "file.txt"),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090"),
    ],
)
def test_paths_lose_their_folders(text, wanted):
    assert document.clean(text) == wanted


def test_what_is_not_finite_is_null(tmp_path):
    _, found = run(tmp_path / "a.json", stage("not_finite"))
    assert found["stages"][0]["rows"] == [{"what": None, "rate": None}]


def _changed(**changes) -> dict:
    return document.new(["a"], reduced=True) | changes


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps(_changed(schema=2)),
        json.dumps(_changed(schema="1")),
        json.dumps(_changed(stages={})),
        json.dumps(_changed(finished=1)),
        json.dumps(_changed(pack="x" * 600)),
        json.dumps(_changed(stages=[{"name": "a", "status": "fine"}])),
        json.dumps(_changed(stages=[_changed()["stages"][0] | {"seconds": "1"}])),
        json.dumps(_changed(stages=[_changed()["stages"][0] | {"rows": [{"ms": [1]}]}])),
        json.dumps(_changed(stages=[_changed()["stages"][0] | {"rows": [{"ms": 1 << 70}]}])),
        json.dumps(_changed(stages=[_changed()["stages"][0] | {"rows": [{"ms": float("nan")}]}])),
        json.dumps(_changed(stages=[_changed()["stages"][0] | {"rows": [{}] * 2001}])),
        "[" * 100_000,
    ],
)
def test_a_file_of_another_form_is_refused(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(Ideogram4QuantError, match=r"a\.json is no result of the command card"):
        document.load(path)


def test_a_file_of_ours_is_read(tmp_path):
    document.save(tmp_path / "a.json", _changed())
    assert document.load(tmp_path / "a.json") == _changed()


def test_an_older_file_is_not_overwritten_unasked(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("mine")
    assert cli.main(["card", "--out", str(path)]) == 1
    assert "not overwritten unasked" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_the_page_replaces_an_earlier_page_and_nothing_else_unasked(tmp_path, capsys):
    """Any other file of that name, a model for instance, stays."""
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(b"# Cards that I collect")
    words = ["card", "--render", str(tmp_path), "--markdown", str(mine)]
    assert cli.main(words) == 1
    assert "not overwritten unasked" in capsys.readouterr().err
    assert mine.read_bytes() == b"# Cards that I collect"
    assert cli.main([*words, "--overwrite"]) == 0
    page = mine.read_bytes()
    assert b"## Modelled" in page
    mine.write_bytes(page + b"an older line")
    assert cli.main(words) == 0
    assert mine.read_bytes() == page


def test_markdown_without_render_is_refused_before_anything_is_measured(tmp_path, capsys):
    words = ["card", "--out", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    assert cli.main(words) == 1
    assert "--render" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
