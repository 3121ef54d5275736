"""The model of cards against sums made by hand, and the page of measured cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ideogram4_quant import cli
from ideogram4_quant.cards import block, known, picture, sizes, tables
from ideogram4_quant.cards.block import How, Parts, block_seconds
from ideogram4_quant.cards.picture import Job, picture_seconds
from ideogram4_quant.checkpoint.pairs import residency
from ideogram4_quant.diagnostics.card import document, render
from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.kernels.configs import GemmConfig

ROOT = Path(__file__).parents[1]
CARD = known.card("RTX 3090")
H, F, LAYERS = 4608, 12288, 34
INT8 = "INT8 W8A8 rotated"


# ---- cards


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("nvidia geforce rtx 5090", "RTX 5090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3070 Ti", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA RTX A6000", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_what_its_driver_calls_it(device, name):
    found = known.find(device)
    assert (found and found.name) == name


def test_an_unknown_card_is_refused_with_the_names_there_are():
    with pytest.raises(OpError, match="RTX 3090, RTX 4090"):
        known.card("GTX 1080")


def test_the_published_rates_belong_together():
    for one in known.CARDS:
        # GeForce: 2048 operations a multiprocessor and cycle, a quarter of it in bf16; H200: 8192
        wanted = 8192 if one.name == "H200" else 2048
        assert one.int8_per_cycle == pytest.approx(wanted, rel=0.01), one.name
        assert one.int8 / one.bf16 == pytest.approx(2 if one.name == "H200" else 4, rel=0.01)
        assert one.source


# ---- a block


def test_bytes_of_a_block():
    linears = 4 * H * H + 3 * H * F + 4 * H * 512
    rest = 4 * H + 2 * 256 + 4 * H  # norms, norms of the heads, bias of the modulation: 16 bits
    assert sizes.block_bytes(INT8) == linears + 2 * rest
    assert sizes.block_bytes("Q4_K") == linears * 144 / 256 + 2 * rest
    assert sizes.block_bytes("BF16") == 2 * (linears + rest)
    assert LAYERS * sizes.block_bytes(INT8) < sizes.copy_bytes(INT8)


def test_a_transfer_is_bytes_over_the_bus():
    assert CARD.transfer_seconds(25.2e9) == pytest.approx(1.0)  # 31.5 GB/s, of which 80 %
    assert known.card("RTX 4060").transfer_seconds(25.2e9) == pytest.approx(2.0)  # eight lanes


def test_attention_by_hand():
    wanted = 4 * 4608**2 * H / 71e12 / 0.75
    assert block.attention_seconds(CARD, 4608) == pytest.approx(wanted)
    assert wanted == pytest.approx(7.3e-3, rel=0.01)
    int8 = 4 * 4608**2 * H / 284e12 / 0.6 + 4608 * 3 * H * 3 / 936e9 / 0.8
    assert block.attention_seconds(CARD, 4608, How(attention="int8")) == pytest.approx(int8)


def test_flash_is_taken_to_reach_no_more_than_was_measured_elsewhere():
    """1068.8 us for 16 heads of 256 at 4096 tokens, half of the products masked: 129 TFLOPS."""
    shares = {name: known.flash_share(known.card(name)) for name in known.FLASH_MEASURED}
    assert shares["RTX 4090"] == pytest.approx(1.374e11 / 1068.8e-6 / 165.2e12, rel=1e-3)
    assert shares == pytest.approx({"RTX 4090": 0.778, "RTX 5090": 0.827}, rel=1e-2)
    assert min(shares.values()) >= known.ASSUMED.attention
    # what carries it over to the 3090: operations of a multiprocessor in a cycle
    per_cycle = [
        c.bf16 / c.multiprocessors / c.clock for c in map(known.card, [*shares, "RTX 3090"])
    ]
    assert per_cycle == pytest.approx([512] * 3, rel=0.01)


def test_a_pass_takes_its_bytes_or_its_instructions():
    values = 1000 * H
    by_bytes = values * 3 / 936e9 / 0.8
    assert block.row_seconds(CARD, 1000, H, (3, 10)) == pytest.approx(by_bytes)
    # four partitions a multiprocessor take an instruction of 32 threads a cycle each
    by_instructions = values * 640 / (82 * 4 * 32 * 1.695e9) / 0.8
    assert block.row_seconds(CARD, 1000, H, (3, 640)) == pytest.approx(by_instructions)


def test_a_product_goes_in_whole_waves_of_tiles(monkeypatch):
    monkeypatch.setattr(block, "_EPILOGUE", 0)
    tile = GemmConfig(128, 256, 128, num_warps=8, num_stages=3)  # one a multiprocessor
    cycles = 2 * 128 * 256 * H / (284e12 / 82 / 1.695e9)
    one_wave = cycles / 1.695e9
    n = 82 * 256  # 82 tiles of 128 rows
    assert block._tile_seconds(CARD, 128, n, H, tile) == pytest.approx(one_wave)
    assert block._tile_seconds(CARD, 129, n, H, tile) == pytest.approx(2 * one_wave)
    small = GemmConfig(128, 128, 64, num_warps=4, num_stages=4)  # two share one: as long together
    assert block._tile_seconds(CARD, 128, 2 * 82 * 128, H, small) == pytest.approx(one_wave)


def test_the_best_tile_counts_and_none_beats_the_peak():
    for n, k in block.LINEARS.values():
        bound = 2 * 4608 * n * k / 284e12 / 0.7
        assert bound < block.gemm_seconds(CARD, 4608, n, k) < 1.2 * bound


def test_q_and_k_eager_cost_what_was_counted_once():
    """9.8 s an image of 48 steps, 0.7 s fused: figures of before this model, by another hand."""
    one = picture_seconds(CARD, INT8).blocks.heads
    other = picture_seconds(CARD, INT8, how=How(heads_fused=False)).blocks.heads
    assert other == pytest.approx(9.8, abs=0.05)
    assert one == pytest.approx(0.7, abs=0.05)


def test_a_packed_weight_is_decoded_and_a_16_bit_one_multiplied_in_16_bits():
    int8, q4, q8 = (block_seconds(CARD, level, 4608) for level in (INT8, "Q4_K", "Q8_0"))
    assert int8.decode == 0
    weights = 4 * H * H + 3 * H * F
    assert q4.decode >= weights * (4.5 / 8 + 1) / 936e9 / 0.8
    assert q4.gemm == int8.gemm
    assert q8.gemm == pytest.approx(2 * 4608 * weights / 71e12 / 0.7)
    as_int8 = block_seconds(CARD, "Q8_0", 4608, How(gguf_compute="w8a8"))
    assert as_int8.gemm == int8.gemm
    with pytest.raises(OpError, match="no such level"):
        block_seconds(CARD, "Q9_K", 4608)


def test_the_host_is_waited_for_where_launching_takes_longer():
    h200 = known.card("H200")
    how = How(fused=False, heads_fused=False)
    few = block_seconds(h200, INT8, 64, how)
    assert few.total == pytest.approx(block.LAUNCH * block.launches(INT8, how))
    assert block_seconds(h200, INT8, 64, How(fused=False, graphs=True)).host == 0
    assert block_seconds(CARD, INT8, 4608).host == 0
    assert block.launches(INT8, How()) < block.launches(INT8, how)


def test_parts_add_up():
    parts = Parts(1, 2, 3, 4, 5, 6, 7)
    assert parts.total == 28
    assert (parts + parts).total == parts.times(2).total == 56


# ---- a picture


def test_a_picture_is_its_parts():
    found = picture_seconds(CARD, INT8)
    blocks = sum(block_seconds(CARD, INT8, tokens).total for tokens in (4608, 4096))
    assert found.blocks.total == pytest.approx(48 * LAYERS * blocks)
    rest = found.encoder + found.stem + found.guidance + found.moves + found.vae + found.png
    assert found.total == pytest.approx(found.blocks.total + rest)
    assert min(found.encoder, found.stem, found.guidance, found.moves, found.vae, found.png) > 0
    one = picture_seconds(CARD, INT8, Job(preset="instant"))
    once = block_seconds(CARD, INT8, 4608).total
    assert one.blocks.total == pytest.approx(8 * LAYERS * once)


def test_the_encoder_by_hand():
    # Qwen3-VL-8B: q and o, k and v of 8 heads of 128, three products of 12288
    weights = 36 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 12288)
    assert sizes.encoder_weights() == weights
    wanted = 2 * weights * 512 / 71e12 / 0.7 + weights * 3 / 936e9 / 0.8
    assert picture_seconds(CARD, INT8).encoder == pytest.approx(wanted)


def test_the_decoder_is_counted_as_diffusers_runs_it():
    from diffusers import AutoencoderKLFlux2
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        latents = torch.empty(1, 32, 128, 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latents)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
    pixels = 1024**2
    assert convolutions == pytest.approx(picture._DECODER_FLOPS_A_PIXEL * pixels, rel=0.01)
    products = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    assert products == pytest.approx(picture._DECODER_ATTENTION * pixels**2, rel=0.01)


def test_what_moves_where_the_card_is_too_small():
    both = picture_seconds(CARD, INT8)
    assert both.residency == "both"
    # FP8 encoder in, and of the copies what it displaced, back again; but for the first block
    # under the first step, which takes longer
    room = CARD.memory - 2**30 - 1.9e9
    displaced = sizes.encoder_bytes("FP8") + 2 * sizes.copy_bytes(INT8) - room
    moved = sizes.encoder_bytes("FP8") + 170e6
    assert both.moves == pytest.approx((moved + sizes.block_bytes(INT8)) / 25.2e9)
    waiting = picture_seconds(CARD, INT8, Job(looks_ahead=False))
    assert waiting.moves == pytest.approx((moved + displaced) / 25.2e9)
    assert displaced / 25.2e9 < both.blocks.total / 48

    small = known.card("RTX 3070")
    turns = picture_seconds(small, "IQ4_XS")
    assert turns.residency == "alternating"
    per_step = sizes.copy_bytes("IQ4_XS") / 25.2e9
    assert turns.moves == pytest.approx(48 * per_step, rel=0.1)

    ahead, blind = (picture_seconds(small, INT8, Job(looks_ahead=looks)) for looks in (True, False))
    assert ahead.residency == "streamed"
    assert ahead.total < blind.total
    streamed = 2 * LAYERS * sizes.block_bytes(INT8) - (small.memory - 2**30 - 1.9e9)
    assert blind.moves - ahead.moves == pytest.approx(48 * streamed / 25.2e9, rel=0.15)


@pytest.mark.parametrize("level", ["INT8 W8A8 rotated", "Q8_0", "Q4_K", "W4A8", "IQ4_XS"])
def test_what_a_card_holds_is_what_the_readme_says_of_such_cards(level):
    """As ``tests/test_doctor_sizes.py`` counts its table: 1 GiB of the card for the desktop."""
    nbytes = sizes.copy_bytes(level)
    for card in known.CARDS[:-1]:
        wanted = residency((nbytes, nbytes), card.memory - 2**30)
        assert picture_seconds(card, level).residency == wanted, card.name


def test_streaming_takes_the_longer_of_both():
    """On a bus that is slower than the card a step takes what its weights take."""
    slow = known.Card("x", 86, 82, 1.695e9, 284e12, 71e12, 936e9, 8 << 30, 1e9, "")
    ahead = picture_seconds(slow, INT8)
    blind = picture_seconds(slow, INT8, Job(looks_ahead=False))
    assert blind.total - ahead.total == pytest.approx(ahead.blocks.total, rel=0.01)


def test_what_was_asked_is_said_to_be_reached_or_not():
    lines = "\n".join(tables.targets())
    for target in tables.TARGETS:
        found = target.modelled()
        assert f"{found:.1f}" in lines
        share = target.efficiency_needed("gemm")
        if found > target.seconds and share is not None:
            ahead = known.Efficiency(gemm=share)
            assert target.modelled(ahead) == pytest.approx(target.seconds, abs=0.01)
            assert "not reached" in lines
    assert tables.Target("x", 1.0).efficiency_needed("gemm") is None
    assert tables.Target("x", 1000.0).modelled() < 1000


# ---- the page


def _measured(device: str = "NVIDIA GeForce RTX 3090", **changes) -> dict:
    found = document.new(["device", "block", "step", "compile", "tiles"], reduced=False)
    found |= {"finished": True} | changes
    rows = {
        "device": [
            {"what": "about", "device": device, "torch": "2.13", "triton": "3.7"},
            {"what": "product", "ceiling": "int8", "per_second": 250e12},
        ],
        "block": [
            {
                "level": INT8, "way": "fused", "tokens": 4608, "heads": "eager",
                "ms": 2e3 * block_seconds(CARD, INT8, 4608, How(heads_fused=False)).total,
            }
        ],
        "tiles": [
            {"what": "qkv", "m": 4608, "n": 13824, "k": 4608, "way": way, "ms": ms}
            for way, ms in (("torch's sums alone", 1.0), ("triton b", 9.0), ("triton a", 6.0))
        ],
        "step": [
            {
                "level": "Q4_K", "attention": "sdpa", "layers": 20, "of": 34, "seconds": 1.0,
                "scaled_seconds": 1.7, "conditional_tokens": 4608, "unconditional_tokens": 4096,
            }
        ],
    }  # fmt: skip
    for stage in found["stages"]:
        stage["rows"] = rows.get(stage["name"], [])
        stage["status"] = "ok" if stage["name"] in rows else "stopped"
    found["stages"][3]["note"] = "it did not end within its time"
    return found


def test_a_measured_card_is_held_against_the_model():
    page = render.page({"mine.json": _measured()})
    assert "No card has been measured" not in page
    assert "| NVIDIA GeForce RTX 3090 | 2.13, 3.7, - | 250 |" in page
    assert "1.7 (sdpa) (20 layers, scaled)" in page
    assert "- mine.json, compile: stopped: it did not end within its time" in page
    line = next(line for line in page.splitlines() if "block, INT8 W8A8 rotated, fused" in line)
    assert line.endswith("| 2.00 |")
    modelled = 1e3 * block.gemm_seconds(CARD, 4608, 13824, 4608)
    line = next(line for line in page.splitlines() if "product qkv" in line)
    assert "4608 tokens, triton a | 6.00 |" in line
    assert line.endswith(f"| {6 / modelled:.2f} |")
    once = sum(
        block_seconds(CARD, "Q4_K", tokens, How(heads_fused=False)).total for tokens in (4608, 4096)
    )
    line = next(line for line in page.splitlines() if "step, Q4_K, sdpa" in line)
    assert line.endswith(f"| {1.7 / (LAYERS * once):.2f} |")


def test_small_sizes_and_unknown_cards_are_told_apart():
    page = render.page({"a.json": _measured("Some other card"), "b.json": _measured(reduced=True)})
    assert "Some other card (a.json) | not among the cards of the model" in page
    assert "b.json: small sizes" in page
    assert page.count("250") == 1


def test_a_strangers_text_stays_text():
    evil = "a|b\n# <script>alert(1)</script> [x](http://y) `z`"
    page = render.page({"x|y.json": _measured(evil)})
    assert "<script>" not in page
    assert "](http" not in page
    assert "\n# " not in page.removeprefix("# Cards")
    head, _, row = page.partition("| card |")[2].splitlines()[:3]
    assert row.startswith("| a b")
    assert row.count("|") == head.count("|") + 2


def test_the_page_of_the_repository_is_what_its_files_make(capsys):
    """After a change: card --render docs/cards --markdown docs/cards.md"""
    assert cli.main(["card", "--render", str(ROOT / "docs" / "cards")]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")


def test_a_file_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert cli.main(["card", "--render", str(tmp_path)]) == 1
    assert "other.json is no result of the command card" in capsys.readouterr().err
