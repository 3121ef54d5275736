"""Seconds on a card as a target, gains that nobody measured, and the level of what a size wrote."""

import itertools

import pytest
import torch

from ideogram4_quant.cards.known import CARDS, card
from ideogram4_quant.cards.picture import picture_seconds
from ideogram4_quant.checkpoint import ModelConfig, open_checkpoint
from ideogram4_quant.checkpoint.canonical import canonical_shapes
from ideogram4_quant.checkpoint.levels import read_catalogue, resolve
from ideogram4_quant.checkpoint.listing import Listing
from ideogram4_quant.quant import QuantOptions, quantize_checkpoint
from ideogram4_quant.quant.allocation import Rung, allocate, allocate_within
from ideogram4_quant.quant.candidate_errors import candidate_errors
from ideogram4_quant.quant.output_names import named_after
from ideogram4_quant.quant.sensitivity import Gain, Loss, default_gain
from ideogram4_quant.quant.storage import STORAGES
from ideogram4_quant.quant.target_times import JOB, modelled_level, times
from ideogram4_quant.tests import quant_model as model

COPIES = ("conditional", "unconditional")


@pytest.mark.parametrize("seed", range(4))
def test_two_limits_hold_and_the_choice_is_near_the_best_of_all(seed):
    """Against every combination."""
    generator = torch.Generator().manual_seed(seed)
    rungs, seconds = {}, {}
    for i in range(5):
        losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        sizes = zip((560, 690, 820, 1060), losses, "abcd", strict=True)
        rungs["c", str(i)] = [Rung(size, loss, name) for size, loss, name in sizes]
        seconds["c", str(i)] = dict(zip("abcd", (0.3, 0.5, -0.2, 0.9), strict=True))
    for budget, limit in ((4000, 0.5), (4600, 1.5), (5300, 9.0), (5300, 0.6)):

        def kept(found, budget=budget, limit=limit):
            small = sum(rung.nbytes for rung in found.values()) <= budget
            return small and sum(seconds[k][r.name] for k, r in found.items()) <= limit + 1e-9

        found = allocate_within(rungs, budget, seconds, limit)
        every = [dict(zip(rungs, each, strict=True)) for each in itertools.product(*rungs.values())]
        best = min(sum(r.loss for r in each.values()) for each in every if kept(each))
        assert kept(found)
        assert sum(rung.loss for rung in found.values()) <= best * 1.5 + 1e-9
    slow = allocate_within(rungs, 5300, seconds, 99.0)
    assert sum(r.loss for r in slow.values()) == pytest.approx(
        sum(r.loss for r in allocate(rungs, 5300).values())
    )
    assert allocate_within(rungs, 2900, seconds, -0.9) is None  # fast and small are not the same


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 4060"])
@pytest.mark.parametrize("storage", ["INT8", "W4A8 g32", "Q4_K", "Q8_0", "BF16", "W6A8 g16"])
def test_a_file_of_one_level_takes_what_the_model_of_the_card_says(name, storage):
    shapes = {
        (copy, name.removesuffix(".weight")): shape
        for copy in COPIES
        for name, shape in canonical_shapes(ModelConfig()).items()
        if name.startswith("layers.") and len(shape) == 2
    }
    found = times(card(name), {key: {storage: 0} for key in shapes}, shapes)
    wanted = picture_seconds(card(name), modelled_level(storage), JOB).denoising
    assert found.of(dict.fromkeys(shapes, storage)) == pytest.approx(wanted, rel=1e-9)


def test_every_storage_is_modelled_but_int4():
    shapes = {("conditional", "layers.0.feed_forward.w1"): (64, 64)}
    for container, names in STORAGES.items():
        found = times(CARDS[0], {k: dict.fromkeys(names, 0) for k in shapes}, shapes)
        (more,) = found.more.values()
        assert set(more) == set(names) - {"W4A4"}, container


def test_errors_of_both_copies_meet_as_seven_to_six():
    """docs/pairs.md: at the copies' own scale guidance alone makes the difference."""
    for kind in ("feed_forward.w2", "attention.qkv", "adaln_modulation"):
        first, second = (default_gain(copy, f"layers.3.{kind}", 34) for copy in COPIES)
        for one, other in zip(first, second, strict=True):
            assert other / one == pytest.approx(36 / 49)


def test_four_bits_of_inputs_cost_what_their_step_does():
    """Gaussian inputs, rotated: a step of 7 codes has (127 / 7)^2 the error energy of int8's."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found = candidate_errors(weight, ("W4A4", "INT8"), "native", None, None)
    inputs = (4.5 / 7) ** 2 / 12
    assert found["W4A4"].int4 == pytest.approx(inputs)
    assert found["W4A4"].int8 == 0
    assert 0.01 < found["W4A4"].weight < 0.03  # 15 levels of a Gaussian
    assert found["INT8"].int8 == pytest.approx((4.5 / 127) ** 2 / 12)
    assert found["INT8"].int4 == 0
    assert found["INT8"].weight < 1e-4


def test_what_weights_and_inputs_lose_arrives_by_gains_of_their_own():
    loss = Loss(0.1, int8=0.01, int4=0.001)
    assert Gain(2.0, 3.0, 5.0).of(loss) == pytest.approx(0.2 + 0.03 + 0.005)


def test_the_copies_of_one_choice_are_found_though_their_linears_differ(tmp_path):
    """One is mostly W4A8, the other mostly INT8."""
    for copy, name, storage in zip(COPIES, ("m", "m_uncond"), ("INT8", "W4A8 g32"), strict=True):
        source = model.write(tmp_path / f"{name}-{copy}.safetensors", model.weights(), copy)
        stored = {f"{copy}.{linear}": storage for linear in model.linear_names()}
        out = tmp_path / f"{name}-2GB.safetensors"
        options = QuantOptions(storage=stored)
        quantize_checkpoint(source, "mixed", out, copy=copy, options=options)
        source.unlink()
        assert open_checkpoint(out).level == "mixed"
    paths = {path.name: path for path in tmp_path.iterdir()}
    catalogue = read_catalogue(
        Listing("diffusion_models", (str(tmp_path),), paths), open_checkpoint
    )
    pair = resolve("mixed", catalogue, ("mixed",), 10**12)
    assert (pair.conditional.name, pair.unconditional.name) == (
        "m-2GB.safetensors",
        "m_uncond-2GB.safetensors",
    )


@pytest.mark.parametrize(
    ("source", "said", "name"),
    [
        ("my-tune-v2.safetensors", "10.4GB", "my-tune-v2-10.4GB.safetensors"),
        ("my-tune-v2-bf16.safetensors", "fit24GB", "my-tune-v2-fit24GB.safetensors"),
        ("tune-10.4GB.safetensors", "in20s", "tune-in20s.safetensors"),
        ("tune-in20s.safetensors", "9GB", "tune-9GB.safetensors"),
        ("style-90s.safetensors", "9GB", "style-90s-9GB.safetensors"),
    ],
)
def test_files_of_a_size_are_named_after_it(source, said, name):
    assert named_after(source, said, ".safetensors") == name
