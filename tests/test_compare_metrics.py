"""Metrics of the comparison against formulas and libraries that share no code with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ideogram4_quant.engine.compare import metrics
from ideogram4_quant.errors import OpError


def picture(seed: int, size=(96, 64)) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).resize(size)


def test_psnr_of_a_known_error():
    flat = Image.new("RGB", (20, 10), (100, 100, 100))
    off = Image.new("RGB", (20, 10), (110, 100, 90))
    expected = 10 * np.log10(255**2 / ((100 + 0 + 100) / 3))
    assert metrics.psnr(flat, off) == pytest.approx(expected, abs=1e-4)


def test_equal_pictures_reach_the_caps():
    a = picture(1)
    assert metrics.psnr(a, a) == metrics.PSNR_CAP
    assert metrics.ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    assert metrics.ms_ssim(a, a) == pytest.approx(1.0, abs=1e-6)


def test_ssim_orders_noise_and_matches_a_direct_evaluation_on_a_constant_shift():
    # For a constant picture against a shifted constant only the luminance term is left:
    # (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2.
    a, b = 100 / 255, 150 / 255
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    flat = Image.new("RGB", (40, 40), (100,) * 3)
    shifted = Image.new("RGB", (40, 40), (150,) * 3)
    assert metrics.ssim(flat, shifted) == pytest.approx(expected, abs=5e-4)  # fp32 variances
    assert metrics.ssim(picture(1), picture(2)) < 0.2


@pytest.mark.parametrize(
    ("size", "scales"), [((1024, 1024), 5), ((128, 64), 3), ((48, 48), 3), ((16, 16), 1)]
)
def test_ms_ssim_uses_the_scales_that_fit(size, scales):
    assert metrics.ms_ssim_scales(*size) == scales
    if max(size) < 200:
        assert 0.0 <= metrics.ms_ssim(picture(3, size), picture(4, size)) < 1.0


@pytest.mark.parametrize(("side", "five"), [(175, False), (176, True)])
def test_the_note_of_scales_agrees_with_torchmetrics(side, five):
    """What all five scales take: torchmetrics itself, with its own five exponents."""
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as measure,
    )

    x = torch.rand(1, 3, side, 2 * side)
    if five:
        assert float(measure(x, x, data_range=1.0)) == pytest.approx(1.0)
    else:
        with pytest.raises(ValueError, match="larger than 160"):
            measure(x, x, data_range=1.0)
    note = metrics.ms_ssim_note([(2 * side, side)])
    assert note == (None if five else "4 of 5 scales at 350x175 (all five from 176 px a side on)")


def test_sizes_that_differ_are_an_error_with_both_sizes():
    with pytest.raises(OpError, match=r"96x64.*98x64|98x64.*96x64"):
        metrics.psnr(picture(1), picture(1, (98, 64)))


def test_latent_sqnr_of_a_scaled_error():
    reference = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(0))
    latents = reference * (1 + 10.0 ** -torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1))
    assert metrics.latent_sqnr(reference, latents) == pytest.approx([60, 40, 20], abs=0.01)
    assert metrics.latent_sqnr(reference, reference) == [metrics.PSNR_CAP] * 3
    with pytest.raises(OpError, match="trajectories"):
        metrics.latent_sqnr(reference, latents[:2])


@pytest.mark.parametrize(
    ("asked", "read", "exact", "distance"),
    [
        ("HELLO", "hello", 1.0, 0.0),
        ("OPEN NOW", "OPEN\nNOW", 1.0, 0.0),
        ("HELLO", "HELO", 0.0, 0.2),
        ("HELLO", "", 0.0, 1.0),
    ],
)
def test_ocr_scores(asked, read, exact, distance):
    scores = metrics.ocr_scores(asked, read)
    assert scores == {"ocr_exact": exact, "ocr_distance": pytest.approx(distance)}


def test_text_asked_reads_captions_and_quotes():
    caption = {
        "compositional_deconstruction": {
            "elements": [
                {"type": "text", "text": "OPEN"},
                {"type": "obj", "desc": "a door"},
                {"type": "text", "text": "NOW"},
            ]
        }
    }
    assert metrics.text_asked(json.dumps(caption)) == "OPEN NOW"
    assert metrics.text_asked('a sign that says "SALE" in red') == "SALE"
    assert metrics.text_asked("a cat") is None
    assert metrics.text_asked("[1, 2]") is None
    assert metrics.text_asked('{"compositional_deconstruction": {"elements": 3}}') is None
