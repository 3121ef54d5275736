"""Sizes and main memory of levels: the sums, and what the README and docs/levels.md say of them."""

from __future__ import annotations

import re
from pathlib import Path

from ideogram4_quant.cards.sizes import copy_bytes, encoder_bytes
from ideogram4_quant.checkpoint import ModelConfig
from ideogram4_quant.checkpoint.canonical import canonical_shapes, is_linear
from ideogram4_quant.checkpoint.pairs import residency
from ideogram4_quant.checkpoint.published import PUBLISHED
from ideogram4_quant.diagnostics.doctor.main_memory import SYSTEM, main_memory
from ideogram4_quant.sampling import PRESETS

ROOT = Path(__file__).parents[1]
GB = 10**9


def test_the_readme_says_of_cards_what_the_sizes_say():
    words = {"both": "both resident", "alternating": "take turns", "streamed": "streamed"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"^\| (\d+) GB \| (.+?) \| (.+?) GB \| (.+?) \| (.+?) GB \| (.+?) GB \|$"
    rows = re.findall(row, readme, re.MULTILINE)
    assert [int(memory) for memory, *_ in rows] == [24, 16, 12, 8]
    for memory, levels, sizes, said, loaded, running in rows:
        free = (int(memory) - 1) * 2**30
        copies = sorted(copy_bytes(level) for level in levels.split(", "))
        ends = sorted({copies[0], copies[-1]})
        assert [f"{size / 1e9:.1f}" for size in ends] == sizes.split(" to ")
        (fits,) = {residency((size, size), free) for size in copies}
        assert words[fits] == said
        needs = [main_memory((size,) * 2, encoder_bytes("FP8"), fits, "cuda") for size in copies]
        assert _range(need.needed for need in needs) == loaded
        assert _range(need.at_speed for need in needs) == running


def test_the_page_says_of_one_branch_what_the_sizes_say():
    page = (ROOT / "docs/levels.md").read_text("utf-8")
    row = r"^\| (.+?) \| (.+?) GB \| (\d+) GB \| (.+?) GB \| (.+?) GB \| (.+?) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert [level for level, *_ in rows] == ["BF16", "Q8_0", "INT8 W8A8 rotated", "IQ4_XS"]
    for level, size, card, loaded, running, passes in rows:
        nbytes = copy_bytes(level)
        assert f"{nbytes / 1e9:.1f}" == size
        cards = (8, 12, 16, 24)
        fitting = [gb for gb in cards if residency((nbytes, 0), (gb - 1) * 2**30) == "both"]
        assert fitting[0] == int(card)
        need = main_memory((nbytes, 0), encoder_bytes("FP8"), "both", "cuda")
        assert [f"{each / 1e9:.0f}" for each in (need.needed, need.at_speed)] == [loaded, running]
        assert passes == f"{PRESETS['fast'].steps}, {PRESETS['instant'].steps}"


def test_the_page_says_of_one_copy_what_the_sizes_say():
    """Beside it a LoRA of rank 16 in 16 bits, on every linear that an unconditional pass runs."""
    shapes = canonical_shapes(ModelConfig())
    linears = [s for n, s in shapes.items() if is_linear(n) and not n.startswith("llm_cond")]
    lora = sum(2 * 16 * (n + k) for n, k in linears)
    page = (ROOT / "docs/levels.md").read_text("utf-8")
    assert f"with {lora / 1e6:.0f} MB for a LoRA of rank 16" in page.replace("\n", " ")
    row = r"^\| (\d+) GB, one copy \| (.+?) \| (.+?) GB \| resident \| (.+?) GB \| (.+?) GB \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert [int(memory) for memory, *_ in rows] == [12, 8]
    for memory, levels, sizes, loaded, running in rows:
        copies = sorted(copy_bytes(level) + lora for level in levels.split(", "))
        ends = sorted({copies[0], copies[-1]})
        assert [f"{size / 1e9:.1f}" for size in ends] == sizes.split(" to ")
        free = (int(memory) - 1) * 2**30
        assert {residency((size, 0), free) for size in copies} == {"both"}
        needs = [main_memory((size, 0), encoder_bytes("FP8"), "both", "cuda") for size in copies]
        assert _range(need.needed for need in needs) == loaded
        assert _range(need.at_speed for need in needs) == running


def _range(values) -> str:
    rounded = sorted({round(value / 1e9) for value in values})
    return " to ".join(str(value) for value in dict.fromkeys((rounded[0], rounded[-1])))


def test_main_memory_is_what_is_held_and_what_is_read_again():
    copies, encoder = (5 * GB, 6 * GB), 8 * GB
    need = main_memory(copies, encoder, "both", "cuda")
    assert (need.needed, need.at_speed) == (SYSTEM, encoder + SYSTEM)
    for fits, device in (
        ("alternating", "cuda"),
        ("streamed", "cuda"),
        (None, "xpu"),
        ("both", "cpu"),
        ("both", "mps"),
    ):
        need = main_memory(copies, encoder, fits, device)
        assert (need.needed, need.at_speed) == (SYSTEM, 19 * GB + SYSTEM)
    need = main_memory(copies, encoder, "both", "cuda", held=10 * GB)
    assert need.needed == need.at_speed == 10 * GB + SYSTEM


def test_computed_sizes_are_those_of_published_files():
    published = {item.level: item.nbytes for item in PUBLISHED if "convrot" in item.name}
    (level, nbytes), *_ = published.items()
    assert abs(copy_bytes(level) / nbytes - 1) < 0.01
