"""Files of measured choices: read again, one for each environment, rebuilt where broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ideogram4_quant.files.user_folder import user_folder
from ideogram4_quant.ops import dispatch
from ideogram4_quant.ops.kernels import configs
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.ops.tuning import choice_files, choices, tuning_jobs
from ideogram4_quant.ops.tuning.autotune import Layer, Measure, tune
from ideogram4_quant.ops.tuning.choices import LINEAR, Key, Measurement, Table
from ideogram4_quant.tests.linear_cases import CPU
from ideogram4_quant.tests.tuning_cases import INT8, fake_times, linear_key

pytestmark = pytest.mark.usefixtures("nothing_measured")


def test_a_second_start_reads_the_file(tmp_path, monkeypatch):
    timed = fake_times(monkeypatch, int_mm=2e-3, reference=1e-3)
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    choices._TABLES.pop(CPU, None)
    before = len(timed)
    table = tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert len(timed) == before
    assert table.get(linear_key(INT8)).seconds == {"int_mm": 2e-3, "reference": 1e-3}
    # another shape joins what is there
    tune([Layer("int8", 16, 64)], CPU, torch.float32, Measure(tmp_path))
    assert len(choice_files.load(tmp_path, CPU)) == 2
    # a candidate that was not there then is measured now
    monkeypatch.setattr(dispatch, "candidates", lambda op, device: ("int_mm", "reference", "new"))
    job = next(iter(tuning_jobs.jobs([INT8], CPU, torch.float32, LinearOptions(), None, 10**9)))
    assert not job.is_settled(table)


def test_versions_and_devices_have_files_of_their_own(tmp_path, monkeypatch):
    first = choice_files.file_for(tmp_path, CPU)
    assert first.parent == tmp_path
    about = choice_files.environment(CPU)
    assert {"device", "torch", "triton", "comfy_kitchen", "threads"} <= set(about)
    for name in about:
        changed = {**about, name: about[name] + " x"}
        monkeypatch.setattr(choice_files, "environment", lambda device, c=changed: c)
        assert choice_files.file_for(tmp_path, CPU) != first


def _saved(folder):
    measured = Measurement(linear_key(INT8), {"int_mm": 1.0, "reference": 2.0}, {"int_mm": 0.0})
    choice_files.save(folder, CPU, Table([measured]))
    return choice_files.file_for(folder, CPU)


BROKEN = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no json": lambda text: "\0" * 50,
    "a list": lambda text: "[]",
    "no measurements": lambda text: "{}",
    "text for a number": lambda text: text.replace('"k": 256', '"k": "256"'),
    "a zero size": lambda text: text.replace('"n": 48', '"n": 0'),
    "a truth value": lambda text: text.replace('"n": 48', '"n": true'),
    "an unknown op": lambda text: text.replace('"int8_linear"', '"rm -rf"'),
    "no times": lambda text: text.replace('"int_mm": 1.0', '"int_mm": NaN'),
    "a time of zero": lambda text: text.replace('"int_mm": 1.0', '"int_mm": 0'),
    "times as a list": lambda text: json.dumps(
        {"measurements": [{**json.loads(text)["measurements"][0], "seconds": [1]}]}
    ),
    "deep": lambda text: "[" * 100_000,
    "too large": lambda text: text + " " * (1 << 23),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_reported_and_rebuilt(case, tmp_path, caplog):
    path = _saved(tmp_path)
    text = path.read_text()
    assert len(choice_files.load(tmp_path, CPU)) == 1
    broken = BROKEN[case](text)
    assert broken != text
    path.write_text(broken)
    assert len(choice_files.load(tmp_path, CPU)) == 0
    assert str(path) in caplog.text
    assert "measuring again" in caplog.text
    tune([INT8], CPU, torch.float32, Measure(tmp_path))
    assert len(choice_files.load(tmp_path, CPU)) == 1


def test_unknown_names_in_a_file_choose_nothing(tmp_path):
    times = {"reference": 2.0, "os.system": 1.0}
    choices.remember(CPU, Table([Measurement(linear_key(INT8), times)]))
    assert dispatch.choose("int8_linear", (5, 48, 256), CPU).name == "reference"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tune([INT8], CPU, torch.float32, Measure(tmp_path / "file"))
    assert "the measured choices are not kept" in caplog.text
    assert len(choices.table(CPU)) == 1


_WRITER = """
import sys
from pathlib import Path
import torch
from ideogram4_quant.ops.tuning import choice_files
from ideogram4_quant.ops.tuning.choices import LINEAR, Key, Measurement, Table
folder, name = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
cpu = torch.device("cpu")
for count in range(1, 40):
    key = Key(LINEAR, name, count, 512, "float32", "0")
    choice_files.save(folder, cpu, Table([Measurement(key, {"int_mm": 1.0})]))
    assert len(choice_files.load(folder, cpu)), "half a file was seen"
"""


def test_two_processes_at_once_leave_a_whole_file(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "error", "-c", _WRITER, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(n)], cwd=root, stderr=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "cannot be read" not in errors
        assert "not kept" not in errors
    entries = json.loads(next(tmp_path.iterdir()).read_text())["measurements"]
    assert len(list(tmp_path.iterdir())) == 1
    assert {entry["n"] for entry in entries} & {1, 2}


def test_the_users_folder_is_the_systems(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert user_folder() == tmp_path / "ideogram4_quant"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_folder().parts[-3:] == ("Library", "Caches", "ideogram4_quant")


def test_another_version_of_the_pack_or_another_tiling_is_measured_anew(tmp_path, monkeypatch):
    first = choice_files.file_for(tmp_path, CPU)
    monkeypatch.setattr(choice_files, "__version__", "9.9.9")
    assert choice_files.file_for(tmp_path, CPU) != first
    monkeypatch.undo()
    thin = {"thin": (configs.GemmConfig(16, 64, 128, 4, 4),)}
    monkeypatch.setattr(configs, "GEMM_CONFIGS", {86: thin})
    assert choice_files.file_for(tmp_path, CPU) != first


def test_what_was_not_measured_stays_marked(tmp_path):
    """Seconds that are extrapolated from a few rows are none of a measurement after a restart."""
    key = Key(LINEAR, 64, 64, 512, "float32", "0")
    made = Measurement(key, {"triton": 1e-3, "int_mm": 9.0}, {}, frozenset({"int_mm"}))
    choice_files.save(tmp_path, CPU, Table([made]))
    (again,) = choice_files.load(tmp_path, CPU)
    assert again == made
    assert "int_mm far behind, not measured" in str(again)
