"""``selftest`` and ``bench`` on what this machine has, and on devices that compute wrongly."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ideogram4_quant import cli
from ideogram4_quant.diagnostics import bench, bench_cases, bench_chart, health, selftest
from ideogram4_quant.ops import dispatch

CPU = torch.device("cpu")


# ---- selftest


def test_every_backend_here_passes(capsys):
    assert cli.main(["selftest", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in (
        "int_mm",
        "reference",
        "GGUF Q4_K through int8",
        "FP8 dense",
        "attention with a mask",
    ):
        assert part in out
    assert ", 0 FAILED, 0 not run" in out
    assert "not there  comfy_kitchen: " in out


def _broken_gemm(q, scale_x, weight, weight_scale, bias, out_dtype):
    out = dispatch.adapters.int_mm_gemm(q, scale_x, weight, weight_scale, bias, out_dtype)
    out[3, 7] *= 1.2
    return out


def _raising_gemm(*_):
    raise RuntimeError("an illegal instruction")


@pytest.mark.parametrize(
    ("gemm", "note"), [(_broken_gemm, ""), (_raising_gemm, "an illegal instruction")]
)
def test_a_backend_that_computes_wrongly_fails_and_is_named(gemm, note, monkeypatch, capsys):
    backend = dispatch.Backend("int_mm", {"int8_gemm": gemm})
    probes = {**dispatch._PROBES, "int_mm": lambda device: (backend, "broken")}
    monkeypatch.setattr(dispatch, "_PROBES", probes)
    assert cli.main(["selftest", "--device", "cpu", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)["results"]
    by_name = {(r["backend"], r["check"]): r for r in results}
    product = by_name["int_mm", "int8 product"]
    assert product["status"] == "FAILED"
    assert note in product["note"]
    assert by_name["reference", "int8 product"]["status"] == "ok"
    assert by_name["sdpa", "attention, fp32"]["status"] == "ok"


def test_wrong_scales_nan_and_int8_values_fail(monkeypatch):
    def quantizer(change):
        def run(x, smooth=None, rotation=None):
            q, scale = dispatch.REFERENCE_OPS["smooth_rotate_quantize_rows"](x, smooth, rotation)
            return change(q.clone(), scale.clone())

        return run

    changes = {
        "scale": lambda q, scale: (q, scale * 1.01),
        "nan": lambda q, scale: (q, scale * float("nan")),
        "values": lambda q, scale: (q + 2, scale),
    }
    for name, change in changes.items():
        ops = {**dispatch.REFERENCE_OPS, "smooth_rotate_quantize_rows": quantizer(change)}
        probe = {"reference": lambda d, o=ops: (dispatch.Backend("reference", o), "changed")}
        monkeypatch.setattr(dispatch, "_PROBES", {**dispatch._PROBES, **probe})
        check = next(
            c for c in selftest.checks(CPU) if c[:2] == ("smooth_rotate to int8", "reference")
        )
        assert not check[3]() <= check[2], name
        monkeypatch.undo()


def test_what_time_leaves_out_is_said_and_no_success_without_a_check(monkeypatch):
    results = list(selftest.selftest(CPU, seconds=0))
    assert {r.status for r in results} == {selftest.NOT_RUN}
    assert len(results) > 50
    monkeypatch.setattr(selftest, "selftest", lambda device: iter(results))
    assert cli.main(["selftest", "--device", "cpu"]) == 1


# ---- bench


@pytest.fixture(scope="module")
def document() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "_STEADY_SECONDS", 0.05)
        patch.setattr(bench_cases, "_CEILING_SIZE", {"cpu": 256})
        return bench.bench(CPU, [32, 70], 256, 2)


def test_every_way_is_timed_for_every_token_count(document):
    for tokens in (32, 70):
        names = {row["name"] for row in document["rows"] if row["tokens"] == tokens}
        here = [r.name for r in dispatch.reports(CPU) if r.available]
        assert {f"int8, {name}" for name in here} | {f"int8 rotated, {n}" for n in here} <= names
        assert {"fp32", "bf16", "Q4_K through int8", "Q4_K decoded", "FP8 decoded"} <= names
        assert {"sdpa", "sdpa, mask"} <= names
        assert "int8, comfy-kitchen's eager op" in names
    for row in document["rows"]:
        assert row["ms"] > 0
        assert 0 < row["of_ceiling"] <= 1
        assert row["of_ceiling"] == row["rate"] / document["ceilings"][row["precision"]]


def test_the_table_has_a_line_a_row(document):
    text = "\n".join(bench._text(document))
    assert "health: " in text
    assert "1.00 x fp32" in text
    assert all(f"  {row['name']} " in text for row in document["rows"])
    assert "linear, 256 -> 256, 70 tokens" in text
    assert "attention, 2 heads, head size 256, 32 tokens" in text


def test_the_chart_is_a_picture_with_a_bar_a_row(document):
    picture = Image.open(io.BytesIO(bench_chart.draw(document))).convert("RGB")
    pixels = np.asarray(picture).reshape(-1, 3)
    colours = {
        tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in bench_chart._COLOURS.values()
    }
    counts = {colour: int((pixels == colour).all(axis=1).sum()) for colour in colours}
    assert all(count > 200 for count in counts.values()), counts


def test_the_command_writes_json_and_a_chart_and_overwrites_nothing(
    document, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "bench", lambda *arguments: document)
    chart = tmp_path / "chart.png"
    command = ["bench", "--device", "cpu", "--json", "--chart", str(chart)]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out) == document
    before = chart.read_bytes()
    assert before[:4] == b"\x89PNG"
    assert cli.main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert chart.read_bytes() == before
    assert cli.main([*command, "--overwrite"]) == 0
    assert cli.main(["bench", "--device", "cpu", "--tokens", "0"]) == 1
    assert "sizes must be positive" in capsys.readouterr().err


def test_health_warns_of_load_heat_and_drift():
    cuda = torch.device("cuda")
    fine = {"clock, MHz": 1700.0, "load, %": 3.0, "temperature, C": 50.0}
    memory = {"memory, GB": 24.0, "memory free, GB": 23.0}
    assert health._warnings(cuda, {"before": fine | memory, "drift": 0.01}) == []
    cases = {
        "throttles": (fine | memory, -0.3),
        "uses 60 %": (fine | memory | {"load, %": 60.0}, 0.0),
        "only 4.0 of 24.0 GB": (fine | memory | {"memory free, GB": 4.0}, 0.0),
        "nvidia-ml-py": (memory, 0.0),
        "88 C": (fine | memory | {"temperature, C": 88.0}, 0.0),
    }
    for words, (before, drift) in cases.items():
        found = health._warnings(cuda, {"before": before, "drift": drift})
        assert any(words in warning for warning in found), words
    # a load average that is still falling is no load
    state = {"before": {"load average": 9.0}, "drift": 0.0, "taken": 0.05}
    assert health._warnings(CPU, state) == []
    busy = health._warnings(CPU, state | {"taken": 0.4})
    assert busy == [
        f"other processes take 40% of the time of {torch.get_num_threads()} threads: "
        "times are too long"
    ]
    assert health._drift([1.0] * 8 + [0.5] * 8) == -0.5


def test_time_that_other_processes_take_is_seen(monkeypatch):
    threads, clock = torch.get_num_threads(), iter([0.0, 0.25])
    monkeypatch.setattr(health, "_rates", lambda device: [1.0] * 8)
    monkeypatch.setattr(health.time, "perf_counter", iter([0.0, 1.0]).__next__)
    monkeypatch.setattr(health.time, "process_time", lambda: threads * next(clock))
    monkeypatch.setattr(health.sys, "platform", "linux")
    assert health.examine(CPU)["state"]["taken"] == pytest.approx(0.75)


def test_a_slow_case_is_still_timed_once_and_the_bar_ends():
    """Some processors take half a minute for an int8 product."""
    ran, seen = [], []
    cases = [bench_cases.Case(n, "int8", lambda n=n: ran.append(n)) for n in ("fast", "slow")]
    progress = lambda done, total: seen.append((done, total))
    times = bench_cases.timed(cases, CPU, 5, 0.0, progress)
    assert ran == ["fast", "slow"] * 2  # a warm-up, which counts nowhere, and one value
    assert set(times) == {"fast", "slow"}
    assert seen == [(i, 12) for i in range(1, 13)]
    assert len(bench_cases.timed(cases, CPU, 5, 60.0)) == 2
    assert 2 + 6 <= ran.count("slow") <= 2 + 1 + 5 * 10  # short runs are repeated in a turn
