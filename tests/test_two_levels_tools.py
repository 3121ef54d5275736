"""What the tools say of copies of two levels: inspect, compare, generate, doctor, the report."""

from __future__ import annotations

import json

import pytest

from ideogram4_quant import cli
from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.checkpoint.pairs import Candidate, Pair
from ideogram4_quant.diagnostics.doctor.cli import _levels
from ideogram4_quant.engine.compare.cases import System
from ideogram4_quant.engine.compare.render import Plan, Settings
from ideogram4_quant.engine.compare.store import Store
from ideogram4_quant.engine.loading import open_pair, pair_label
from ideogram4_quant.errors import PairMismatchError
from ideogram4_quant.nodes import report
from ideogram4_quant.ops.linear import LinearOptions
from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.quant.inspect_pair import inspect_pair

LABEL = "BF16 + Q4_K"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """(the conditional copy in BF16, the unconditional one in Q4_K)"""
    out = tmp_path_factory.mktemp("two") / "unconditional.gguf"
    quantize_checkpoint(tiny.unconditional_file, "Q4_K", out)
    return tiny.conditional_file, out


def test_inspect_tells_a_pair_and_what_it_takes(files, capsys):
    sizes = [path.stat().st_size for path in files]
    command = ["inspect", str(files[0]), "--uncond", str(files[1])]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["level"], found["conditional"]["level"]) == (LABEL, "BF16")
    for size, there in zip(sizes, found["weight_bytes"], strict=True):
        assert there == pytest.approx(size, rel=0.02)  # headers
    assert cli.main(command) == 0
    assert f"\npair: {LABEL}, " in capsys.readouterr().out
    with pytest.raises(PairMismatchError):
        inspect_pair(files[0], files[0])


def test_generate_and_compare_name_both_levels(files, tiny, tmp_path):
    assert pair_label(open_pair(*files)) == LABEL
    assert pair_label((open_checkpoint(files[0]), None)) == "BF16"
    settings = Settings(tiny.encoder_dir, tiny.vae_dir, steps=3, read=False, device="cpu")
    systems = [System("two", *files), System("alone", files[0], guided=False)]
    plan = Plan(systems, [], settings, Store(tmp_path))
    two, alone = (plan.rendered(system).scores for system in systems)
    assert (two.level, alone.level) == (LABEL, "BF16")
    assert two.bytes == sum(path.stat().st_size for path in files)


def test_doctor_says_what_auto_pairs_and_what_each_copy_takes():
    row = {
        "level": "Q6_K + Q5_K",
        "copy_bytes": 8 * 10**9,
        "unconditional_bytes": 7 * 10**9,
        "on_this_device": "both",
        "ram_needed": 27e9,
        "ram_at_speed": 12e9,
    }
    *_, line = _levels({"levels": [], "expected": [], "auto": row["level"], "auto_pair": row})
    assert line == (
        "auto picks Q6_K + Q5_K (conditional + unconditional): 8.00 GB + 7.00 GB; both copies fit; "
        "RAM 27, 12 GB"
    )
    *_, line = _levels(
        {"levels": [], "expected": [], "auto": "Q4_K", "auto_pair": row | {"level": "Q4_K"}}
    )
    assert line == "auto picks Q4_K"


def test_the_loaders_report_says_of_each_copy_what_runs(files):
    first, second = (Candidate(path.name, path, open_checkpoint(path)) for path in files)
    pair = Pair("BF16", first, second)
    here = report.Machine("card", 10**12, "bfloat16", ())
    lines = report.text(pair, "auto", LinearOptions(), here, details=True).splitlines()
    assert lines[0].startswith(f"{LABEL}, both copies, ")
    assert lines[0].endswith("; auto picked it, the first level here that fits")
    assert "conditional, quantized: nothing" in lines
    assert any(line.startswith("unconditional, kept in 16 bits: ") for line in lines)
    assert "backend: conditional dense bfloat16; unconditional reference" in lines
    assert any(line.startswith("  Q4_K computed as W8A8: ") for line in lines)
    note = report.summary(pair, "BF16", LinearOptions(), here)
    assert note["level"] == LABEL
    assert note["files"]["unconditional"]["name"] == files[1].name
