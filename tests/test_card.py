"""The command ``card``: a whole run at small size, and stages that fail in every way there is."""

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


# ---- the real stages, at small size on the CPU


@pytest.fixture(scope="module", params=["torch alone", pytest.param("all", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory) -> dict:
    """The command as a user runs it, where neither Triton nor comfy-kitchen can be imported."""
    folder = tmp_path_factory.mktemp("card")
    paths = [str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    if request.param == "torch alone":
        for name in ("triton", "comfy_kitchen"):
            text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
            (folder / f"{name}.py").write_text(text)
        paths.insert(0, str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = ["card", "--out", "card.json", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(Path(cli.__file__).parent), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "card.json" in done.stdout
    return document.load(folder / "card.json") | {"kitchen": request.param == "all"}


def test_every_part_runs_and_says_what_it_measured(whole):
    stages = by_name(whole)
    assert whole["reduced"]
    assert whole["finished"]
    assert list(stages) == [s.name for s in card.STAGES]
    statuses = {name: entry["status"] for name, entry in stages.items()}
    assert statuses.pop("selftest") == ("ok" if whole["kitchen"] else "partly")
    assert set(statuses.values()) == {"ok"}, stages
    assert not [row for name in statuses for row in stages[name]["rows"] if "failed" in row][1:]
    about = stages["device"]["rows"][0]
    assert about["torch"]
    assert about["device"].startswith("cpu")
    ceilings = {row["ceiling"] for row in stages["device"]["rows"] if "ceiling" in row}
    assert ceilings == {"bf16", "fp16", "fp32", "int8", "memory"}


def test_the_rows_hold_the_arithmetic_they_claim(whole):
    stages = by_name(whole)
    for row in stages["tiles"]["rows"]:
        work = 2 * row["m"] * row["n"] * row["k"]
        assert row["tera a second"] == pytest.approx(work / row["ms"] / 1e9)
        rate = next(r["per_second"] for r in stages["device"]["rows"] if r.get("ceiling") == "int8")
        assert row["of_ceiling"] == pytest.approx(work / (row["ms"] / 1e3) / rate)
    gated = [r for r in stages["rows"]["rows"] if r["what"] == "SwiGLU to int8"]
    assert gated  # two fp32 values read, one byte written
    for row in gated:
        assert row["giga bytes a second"] == pytest.approx(48 * 1024 * 9 / row["ms"] / 1e6)
    # Q4_K has 144 bytes for 256 weights, written as one byte each
    q4 = next(r for r in stages["decode"]["rows"] if (r["what"], r["way"]) == ("Q4_K", "to int8"))
    moved = 1024 * 512 * (144 / 256 + 1)
    assert q4["giga bytes a second"] == pytest.approx(moved / q4["ms"] / 1e6)


def test_a_block_of_each_level_both_ways_and_a_step_of_both_copies(whole):
    stages = by_name(whole)
    ways = {(row["level"], row["way"]) for row in stages["block"]["rows"]}
    assert {level for level, _ in ways} >= {"INT8 W8A8 rotated", "Q4_K", "BF16", "W4A8", "Q8_0"}
    assert {way for _, way in ways} == {"fused", "plain"}
    for row in stages["step"]["rows"]:
        assert (row["layers"], row["of"]) == (2, 2)
        assert row["seconds"] == row["scaled_seconds"] > 0
    # INT8: 4 K^2 + 3 K F weights of a byte, a scale a channel, the modulation in fp32
    h, f = 512, 1024
    wanted = 4 * h * h + 3 * h * f + 4 * (5 * h + 2 * f) + 4 * 4 * h * 512
    int8 = next(r for r in stages["block"]["rows"] if r["level"] == "INT8 W8A8 rotated")
    assert int8["mb"] == pytest.approx(wanted / 1e6)


def test_fused_and_plain_blocks_agree():
    import torch

    from ideogram4_quant.diagnostics.card import transformer, weights
    from ideogram4_quant.diagnostics.card.common import REDUCED

    with torch.inference_mode():
        inputs = transformer.inputs_of(96, REDUCED, torch.device("cpu"), torch.float32)
        for level in weights.LEVELS:
            own = transformer.Block(level, REDUCED, torch.device("cpu"), torch.float32)
            one, two = own.fused(*inputs), own.plain(*inputs)
            error = ((one - two).norm() / two.norm()).item()
            assert error < 3e-3, (level, error)
            # a step does not drown in what the residual carries
            assert ((two - inputs[0]).norm() / inputs[0].norm()).item() > 0.1, level


def test_a_wrong_result_is_in_the_note_and_in_the_rows(monkeypatch):
    from ideogram4_quant.diagnostics import selftest
    from ideogram4_quant.diagnostics.card import machine
    from ideogram4_quant.diagnostics.card.worker import Context, _end

    def checks(device):
        yield "product 16 x 328 x 4608, fp16", "one", 0.1, lambda: order.append("fp16") or 0.0
        yield "attention", "one", 0.1, lambda: order.append("small") or 0.5
        yield "product 16 x 328 x 4608, bf16", "one", 0.1, lambda: order.append("bf16") or 0.05

    order: list[str] = []
    monkeypatch.setattr(selftest, "checks", checks)
    context = Context("cpu", True, time.perf_counter() + 60)
    rows = list(machine.selftest(context))
    assert order == ["bf16", "small", "fp16"]  # what a step runs comes first
    assert rows[0]["check"] == "attention"
    assert rows[0]["failed"] == "a wrong result"
    assert rows[1] == {"backend": "one", "passed": 2, "worst_of_allowed": 0.5}
    assert _end(context) == ("partly", "1 checks FAILED")


def test_one_way_that_fails_leaves_the_others_their_times():
    import torch

    from ideogram4_quant.diagnostics.card.common import measured
    from ideogram4_quant.diagnostics.card.worker import Context

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    context = Context("cpu", True, time.perf_counter() + 60)
    functions = {"large": out_of_memory, "small": lambda: sum(range(100))}
    times, failed = measured(functions, context, torch.device("cpu"))
    assert set(times) == {"small"}
    assert failed == {"large": "OutOfMemoryError: CUDA out of memory"}
    over = Context("cpu", True, time.perf_counter() - 1)
    assert measured(functions, over, torch.device("cpu")) == ({}, {})
    assert over.missing == ["large", "small"]


def test_attention_of_torchs_own_kernels_is_forced_or_refused():
    import torch

    from ideogram4_quant.diagnostics.card import kernels
    from ideogram4_quant.diagnostics.card.common import measured, random
    from ideogram4_quant.diagnostics.card.worker import Context

    q, k, v = (random((1, 2, 16, 256), torch.device("cpu"), torch.float32, s) for s in range(3))
    functions = {name: lambda run=run: run(q, k, v) for name, run in kernels._torchs().items()}
    context = Context("cpu", True, time.perf_counter() + 60)
    times, failed = measured(functions, context, torch.device("cpu"))
    assert "torch flash" in times
    assert set(times) | set(failed) == set(functions)
