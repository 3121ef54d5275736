"""What ``card`` measures: a whole run at small size on the CPU, and its stages one by one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ideogram4_quant import cli
from ideogram4_quant.diagnostics.card import cli as card
from ideogram4_quant.diagnostics.card import document
from ideogram4_quant.tests.test_card import by_name


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
            assert torch.equal(one, two), level  # fp32 on a CPU: the same sums in the same order
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
