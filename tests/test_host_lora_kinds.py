"""LoRA files of every kind in a real ComfyUI, at the levels: each equal to its dense weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ideogram4_quant.tests import fixtures_storage as storage
from ideogram4_quant.tests.host.level_files import write_level
from ideogram4_quant.tests.lora_kind_cases import CASES, KINDS, STOCK

pytestmark = pytest.mark.host
WITHOUT_ENCODER = ("W6A8",)  # older comfy-kitchens cannot encode it anew
HOSTS_OWN = tuple(level for level in storage.STOCK if level not in WITHOUT_ENCODER)
OURS = ("FP8", "INT8 W8A8 rotated", "INT8 W8A8", "Q8_0", "Q4_K", "NF4")
LEVELS = ("BF16", *OURS, *HOSTS_OWN)
STRENGTHS = (1.0, -0.5)
TABLE = Path(__file__).parents[1] / "docs" / "ground.md"


@pytest.fixture(scope="module")
def found(tiny, base, in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lora kinds")
    pair = {"conditional": tiny.conditional_file, "unconditional": tiny.unconditional_file}
    files = {
        level: {copy: str(write_level(file, level, folder, copy)) for copy, file in pair.items()}
        for level in LEVELS
    }
    weights, listed = load_file(tiny.conditional_file), {}
    (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
    for number, (name, case) in enumerate(CASES.items()):
        file = f"kind {number}.safetensors"
        save_file(dict(case.state), base / "models" / "loras" / file)
        merged = {}
        for strength in STRENGTHS:
            merged[str(strength)] = str(folder / f"{number} {strength}.safetensors")
            save_file(case.merged(weights, strength), merged[str(strength)])
        listed[name] = {"file": file, "merged": merged}
    stock = {name: str(folder / f"stock {n}.safetensors") for n, name in enumerate(KINDS)}
    merged = {}
    for name, file in stock.items():
        save_file(dict(KINDS[name].state), file)
        for strength in STRENGTHS:
            merged.setdefault(name, {})[str(strength)] = f"{file} {strength}"
            save_file(KINDS[name].merged(weights, strength), f"{file} {strength}")
    return in_host("lora_kinds.py", *map(json.dumps, (files, listed, [stock, merged])))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_weights_in_full_precision(found, name, strength):
    case = found["BF16"]["cases"][name]
    assert case["effect"] > 0.01  # the file does something
    assert case["errors"][str(strength)] < 1e-5


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("name", CASES)
def test_adds_no_more_than_one_quantization(found, level, name, strength):
    """Two of independent errors are a square root of 2 of one."""
    error = found[level]["cases"][name]["errors"][str(strength)]
    assert error < 2**0.5 * found[level]["none"]


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_left_behind(found, level):
    assert found[level]["exact afterwards"]
    assert all(case["zero"] for case in found[level]["cases"].values())


@pytest.mark.parametrize("level", LEVELS)
def test_two_files_of_two_kinds_in_either_order(found, level):
    assert found[level]["two"] < 1e-5


@pytest.mark.parametrize("level", LEVELS)
def test_streamed_weights_are_changed_alike(found, level):
    """The host does not quantize those again, so they are at least as near as the loaded ones."""
    half, none, whole = found[level]["streamed"]
    assert 0 < half["left"] < none["left"]
    assert whole["left"] == 0
    assert all(step["error"] < 1.1 * max(whole["error"], 1e-4) for step in (half, none))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_fused_blocks_take_the_changed_weights_norms_and_biases(found, level):
    for name, error in found[level]["fused"].items():
        assert error < 2**0.5 * found[level]["none"], name
        assert error < 0.8 * found[level]["cases"][name]["effect"], name


@pytest.mark.parametrize("level", LEVELS)
def test_the_unconditional_copy_alone(found, level):
    other = found[level]["unconditional"]
    assert other["conditional same"]
    assert other["exact afterwards"]
    assert other["effect"] > 0.01


@pytest.mark.parametrize("name", CASES)
def test_the_report_says_what_was_baked(found, name):
    baked, report = CASES[name].baked, found["Q4_K"]["cases"][name]["report"]
    assert (f"baked into the weights, {baked} linears" in report) == bool(baked)


@pytest.mark.parametrize("name", KINDS)
def test_what_stock_makes_of_each_kind(found, name):
    """The table in docs/ground.md says the same."""
    assert [told(result) for result in found["stock"][name]] == list(STOCK[name])
    row = f"| `{name}` | right | right | {' | '.join(STOCK[name])} |"
    assert row in TABLE.read_text(encoding="utf-8")


def told(result: dict) -> str:
    if result["effect"] == 0:
        return "**nothing**"
    return "right" if result["error"] < 1e-4 else "**other weights**"
