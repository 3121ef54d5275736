"""The loader's report: what was found, what will run and why, what it costs and needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ideogram4_quant.checkpoint.folding import Folding
from ideogram4_quant.checkpoint.level_order import LEVELS
from ideogram4_quant.checkpoint.pairs import find_pair
from ideogram4_quant.nodes import costs, report
from ideogram4_quant.ops.blocks import PACKED
from ideogram4_quant.ops.dispatch import BackendReport
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.ops.tuning.choices import ATTENTION, GGUF, LINEAR, Key, Measurement, Table
from ideogram4_quant.quant import RECIPES
from ideogram4_quant.tests.fixtures_levels import BOTH, Header, catalogue

PACK = Path(report.__file__).parents[1]


@pytest.fixture
def model_file(tmp_path, monkeypatch) -> Path:
    """What the candidate named f stands for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(bytes(100))
    return tmp_path / "f"


def machine(memory: int, dtype: str = "bfloat16") -> report.Machine:
    backends = (
        BackendReport("triton", False, "no compiler here"),
        BackendReport("int_mm", True, "torch._int_mm"),
    )
    return report.Machine("card", memory, dtype, backends)


@pytest.mark.parametrize(
    ("level", "compute", "expected"),
    [
        ("INT8 W8A8", "auto", "backend: int_mm (torch._int_mm)"),
        ("Q4_K", "auto", "backend: int_mm (torch._int_mm)"),
        ("Q4_K", "dense", "backend: dense bfloat16, weights decoded layer by layer"),
        ("Q8_0", "auto", "backend: dense bfloat16, weights decoded layer by layer"),
        ("FP8", "auto", "backend: dense bfloat16, weights decoded layer by layer"),
        ("BF16", "auto", "backend: dense bfloat16"),
    ],
)
def test_report_says_what_multiplies_and_why_not_the_others(model_file, level, compute, expected):
    chosen = find_pair(level, catalogue(f=Header(level, BOTH)).candidates)
    options = LinearOptions(gguf_compute=compute)
    lines = report.text(chosen, "auto", options, machine(10**12), details=True).splitlines()
    assert expected in lines
    cost = [line for line in lines if "on the pocket model" in line]
    assert len(cost) == (level in PACKED)
    if cost:
        figures = costs.figures()["choices"]
        for kind in ("w8a8", "dense"):
            assert f"{figures[f'{level} {kind}']['sqnr']} dB" in cost[0]
    assert ("  triton: no compiler here" in lines) == ("int_mm" in expected)


def measurement(op: str, tokens: int, detail: str, **seconds: float) -> Measurement:
    size = (18, 256) if op == ATTENTION else (4608, 12288)
    return Measurement(Key(op, *size, tokens, "bfloat16", detail), seconds)


def test_report_says_what_was_measured(model_file):
    table = Table(
        [
            measurement(LINEAR, 4608, "0", int_mm=3e-3, triton=2e-3),
            measurement(LINEAR, 512, "0", int_mm=1e-3, triton=2e-3),
        ]
    )
    here = replace(machine(10**12), measured=table)
    chosen = find_pair("INT8 W8A8", catalogue(f=Header("INT8 W8A8", BOTH)).candidates)
    lines = report.text(chosen, "auto", LinearOptions(), here, details=True).splitlines()
    assert "backend: triton, the fastest measured here for each shape" in lines
    figures = "  int8 linear 12288 -> 4608, 4608 tokens, bfloat16: triton 2 ms, int_mm 3 ms"
    assert figures in lines
    assert not any("512 tokens" in line for line in lines)
    assert "attention: the host's own setting" in lines
    asked = report.text(chosen, "auto", LinearOptions(backend="int_mm"), here)
    assert "backend: int_mm, as asked" in asked


def test_report_says_where_decoding_is_faster(model_file):
    chosen = find_pair("Q4_K", catalogue(f=Header("Q4_K", BOTH)).candidates)
    for dense, expected in ((1e-3, "faster here than int8"), (3e-3, "backend: int_mm")):
        table = Table([measurement(GGUF, 2048, "Q4_K", w8a8=2e-3, dense=dense)])
        here = replace(machine(10**12), measured=table)
        assert expected in report.text(chosen, "auto", LinearOptions(), here)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("host", "attention: the host's own setting"),
        ("sdpa", "attention: sdpa, as asked"),
        ("int8", "relative error of 0.010 against 0.002"),
        ("auto", "int8, the fastest measured here"),
    ],
)
def test_report_says_which_attention_and_what_it_costs(model_file, asked, expected):
    chosen = find_pair("FP8", catalogue(f=Header("FP8", BOTH)).candidates)
    found = measurement(ATTENTION, 4608, "", sdpa=9e-3, int8=3e-3)
    table = Table([replace(found, errors={"sdpa": 2e-3, "int8": 1e-2})])
    here = replace(machine(10**12), attention=asked, measured=table)
    shown = report.text(chosen, "auto", LinearOptions(), here, details=True)
    assert expected in shown
    assert ("relative error: int8 1.0e-02, sdpa 2.0e-03" in shown) == (asked != "host")
    assert report.summary(chosen, "auto", LinearOptions(), here)["attention"] in shown


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(12, "everything stays there"), (10, "one copy at a time"), (6, "streamed from RAM")],
)
def test_report_says_what_fits(model_file, memory, expected):
    chosen = find_pair("Q4_0", catalogue(f=Header("Q4_0", BOTH, 10**10)).candidates)
    shown = report.text(
        chosen, "Q4_0", LinearOptions(), machine(memory * 10**9, "float32"), details=True
    )
    assert expected in shown
    assert "no bfloat16" in shown
    assert f"fingerprint {report.fingerprint(model_file)[:16]}" in shown


def test_report_says_that_a_file_is_folded_and_what_of_loras(model_file):
    smooth = {name: torch.ones(4) for name in ("layers.0.attention.qkv", "layers.0.attention.o")}
    folding = Folding(smooth, {"layers.0.attention.o": 64})
    for header, count in ((Header("Q8_0", BOTH), 0), (Header("Q8_0", BOTH, folded=folding), 2)):
        chosen = find_pair("Q8_0", catalogue(f=header).candidates)
        asked = (chosen, "auto", LinearOptions(), machine(10**12))
        lines = [line for line in report.text(*asked).splitlines() if line.startswith("folded: ")]
        assert len(lines) == (count > 0)
        for line in lines:
            assert "conditional 2 linears, unconditional 2 linears; undone while loading" in line
            assert "LoRAs work here by any node" in line
        files = report.summary(*asked)["files"]
        assert {file["folded"] for file in files.values()} == {count}


def test_figures_of_every_gguf_level_are_there():
    found = costs.figures()
    levels = [level for level in LEVELS if level in RECIPES and level in PACKED]
    assert list(found["linear"]) == levels
    for level in levels:
        for kind in ("w8a8", "dense"):
            assert 0 < found["choices"][f"{level} {kind}"]["sqnr"] < 100
    alone = found["choices"]["conditional alone"]["time"]
    assert f"{alone} x the time" in costs.without_guidance(details=True)
    page = (PACK / "web/docs/Ideogram4QuantGuider.md").read_text("utf-8")
    assert f"| the conditional copy alone | {alone:.2f} |" in page
    for row, name in {
        "reuse_unconditional 2": "reuse 2",
        "guidance_end 0.5": "guidance until half",
    }.items():
        measured = found["choices"][name]
        start = f"| {row} | {measured['time']:.2f} | {measured['sqnr']} dB"
        line = next(line for line in page.splitlines() if line.startswith(start))
        assert line.endswith(f"| {measured['words']} of {found['prompts']} |")


@pytest.mark.parametrize(("ram", "short"), [(21, False), (9, True)])
def test_expected_memory_is_compared_with_what_is_free(model_file, ram, short):
    chosen = find_pair("Q4_0", catalogue(f=Header("Q4_0", BOTH, 10**10)).candidates)
    here = replace(machine(24 * 10**9), free=3 * 10**9, ram_free=ram * 10**9)
    line, too_much = report.expected_memory(chosen, here)
    assert "card has 24.00 GB, 3.00 GB of them free: everything stays there" in line
    assert f"loading takes 10.00 GB of RAM, {ram}.00 GB are free" in line
    assert too_much == short
    assert ("pick a smaller level" in line) == short


def test_one_copy_with_a_lora_is_no_half_model_and_counts_once(model_file):
    pair = replace(
        find_pair("INT8 W8A8", catalogue(f=Header("INT8 W8A8", BOTH)).candidates),
        unconditional=None,
    )
    about = (pair, "auto", LinearOptions(), machine(10**12), "off", "the conditional copy with x")
    text = report.text(*about)
    assert "unconditional: the conditional copy with x" in text.splitlines()
    assert "half a model" not in text
    assert report.summary(*about)["unconditional"] == "the conditional copy with x"
    assert "unconditional" not in report.summary(*about[:5])


@pytest.mark.parametrize(
    ("memory", "first"),
    [
        (24, "Q4_K, both copies, 11.20 GB, resident: fits card (24.00 GB)"),
        (12, "Q4_K, both copies, 11.20 GB, copies in turns: one fits card (12.00 GB), the other "),
        (6, "Q4_K, both copies, 11.20 GB, streamed from RAM, slow: does not fit card (6.00 GB)"),
    ],
)
def test_first_line_says_what_it_is_and_whether_it_fits(model_file, memory, first):
    chosen = find_pair("Q4_K", catalogue(f=Header("Q4_K", BOTH, 11_200_000_000)).candidates)
    here = machine(memory * 10**9)
    for details in (False, True):
        text = report.text(chosen, "Q4_K", LinearOptions(), here, details=details)
        assert text.startswith(first)
        assert "auto picked it" not in text
    assert "auto picked it" in report.text(chosen, "auto", LinearOptions(), here).splitlines()[0]


def test_details_are_behind_a_switch(model_file):
    chosen = find_pair("INT8 W8A8", catalogue(f=Header("INT8 W8A8", BOTH)).candidates)
    table = Table([measurement(LINEAR, 4608, "0", int_mm=3e-3, triton=2e-3)])
    here = replace(machine(10**12), measured=table)
    short = report.text(chosen, "INT8 W8A8", LinearOptions(), here)
    long = report.text(chosen, "INT8 W8A8", LinearOptions(), here, details=True)
    for word in ("fingerprint", " ms", "no compiler here", "which copy it is", "kept in 16 bits"):
        assert word not in short
        assert word in long
    assert len(short.splitlines()) <= 5


@pytest.mark.parametrize("faster", ["w8a8", "dense"])
def test_no_line_contradicts_another(model_file, faster):
    """Where int8 was measured slower, what it costs is that of decoding too."""
    seconds = {"w8a8": 3e-3, "dense": 3e-3} | {faster: 1e-3}
    here = replace(machine(10**12), measured=Table([measurement(GGUF, 2048, "Q4_K", **seconds)]))
    chosen = find_pair("Q4_K", catalogue(f=Header("Q4_K", BOTH)).candidates)
    text = report.text(chosen, "Q4_K", LinearOptions(), here)
    assert ("backend: dense" in text) == (faster == "dense")
    assert ("computed as 16-bit" in text) == (faster == "dense")
    assert ("computed as W8A8" in text) == (faster == "w8a8")


def test_decibels_carry_a_word(model_file):
    words = {"Q8_0": "very near", "Q5_K": "differences show", "Q2_K": "the loss shows"}
    for level, word in words.items():
        chosen = find_pair(level, catalogue(f=Header(level, BOTH)).candidates)
        lines = report.text(chosen, level, LinearOptions(), machine(10**12)).splitlines()
        (line,) = (line for line in lines if " dB" in line)
        assert line.index(word) < line.index(" dB")


def test_what_was_not_measured_is_not_called_so():
    """A candidate far behind is timed on a few rows: no time at the full size is claimed."""
    key = measurement(LINEAR, 4608, "0", triton=2e-3).key
    line = str(Measurement(key, {"triton": 2e-3, "int_mm": 9.66}, {}, frozenset({"int_mm"})))
    assert "triton 2 ms" in line
    assert "int_mm far behind, not measured at this size" in line
    assert "9.66" not in line
    assert "9,660 ms" in str(Measurement(key, {"int_mm": 9.66}))
