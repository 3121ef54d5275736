"""Whole pictures: the engine against diffusers' unmodified Ideogram4Pipeline."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine import generate as module
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, generate, initial_noise
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.engine.vae import load_vae
from ideogram4_quant.errors import CheckpointError, OpError, PairMismatchError
from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.tests.tiny_model import CONFIG, canonical_state, random_transformer

PROMPT = '{"high_level_description":"a word"}'
SMALL = GenerateRequest(PROMPT, 64, 32, seed=7, preset="turbo", steps=6)


@pytest.fixture(scope="module")
def models(tiny) -> Models:
    pair = open_pair(tiny.conditional_file, tiny.unconditional_file)
    encoder = load_encoder(tiny.encoder_dir, device="cpu")
    return load_pair(pair, encoder, load_vae(tiny.vae_dir, device="cpu"), device="cpu")


def psnr(one, other) -> float:
    difference = np.asarray(one).astype(float) - np.asarray(other).astype(float)
    error = np.square(difference).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def pipeline_picture(tiny, request, **settings):
    return tiny.pipeline()(
        request.prompt,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        max_sequence_length=64,
        **settings,
    ).images[0]


SCHEDULES = {
    "turbo": {"num_inference_steps": 12, "guidance_schedule": (7.0,) * 11 + (3.0,), "mu": 0.5},
    "default": {"num_inference_steps": 20, "guidance_schedule": (7.0,) * 18 + (3.0,) * 2},
}


@pytest.mark.parametrize(("preset", "size"), [("default", (128, 64)), ("turbo", (48, 80))])
def test_pictures_equal_the_unmodified_pipelines(tiny, models, preset, size):
    request = replace(SMALL, preset=preset, steps=None, width=size[0], height=size[1])
    found = generate(request, models).image
    wanted = pipeline_picture(tiny, request, std=1.75, **SCHEDULES[preset])
    assert found.size == wanted.size == size
    assert np.asarray(wanted).std() > 10  # a picture, not a plain colour
    assert psnr(found, wanted) >= 60


def test_constant_guidance_and_custom_steps_equal_the_pipelines(tiny, models):
    request = replace(SMALL, preset="quality", steps=5, guidance=2.3)
    wanted = pipeline_picture(
        tiny, request, num_inference_steps=5, guidance_scale=2.3, guidance_schedule=None
    )
    assert psnr(generate(request, models).image, wanted) >= 60


def test_one_request_makes_one_picture(models):
    first, again = generate(SMALL, models), generate(SMALL, models)
    assert torch.equal(first.latents, again.latents)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    other = generate(replace(SMALL, seed=8), models)
    assert psnr(first.image, other.image) < 30


def test_noise_is_what_diffusers_draws():
    from diffusers.utils.torch_utils import randn_tensor

    generator = torch.Generator().manual_seed(5)
    assert torch.equal(initial_noise(5, 6, 128), randn_tensor((1, 6, 128), generator=generator))


def test_progress_callback_and_trajectory(models):
    done, seen = [], []
    result = generate(
        replace(SMALL, steps=4, keep_latents=True),
        models,
        lambda i, n: done.append((i, n)),
        lambda step, latents: seen.append((step.index, latents.clone())),
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert len(result.trajectory) == 4
    for (_, latents), kept in zip(seen, result.trajectory, strict=True):
        assert torch.equal(latents[0], kept)
    assert torch.equal(result.trajectory[-1], result.latents)
    assert generate(replace(SMALL, steps=2), models).trajectory == ()
    assert set(result.seconds) == {"encode", "sample", "decode"}


def passes(monkeypatch, request, models) -> tuple[int, int]:
    """How often the conditional and the unconditional copy ran."""
    ran = []
    original = module.velocity
    monkeypatch.setattr(
        module, "velocity", lambda model, *rest: ran.append(model) or original(model, *rest)
    )
    generate(request, models)
    conditional = sum(m is models.conditional for m in ran)
    return conditional, len(ran) - conditional


def test_passes_saved(monkeypatch, models):
    request = replace(SMALL, steps=10, guidance=4.0)
    assert passes(monkeypatch, request, models) == (10, 10)
    assert passes(monkeypatch, replace(request, interval=(0.2, 0.7)), models) == (10, 5)
    assert passes(monkeypatch, replace(request, reuse=2), models) == (10, 5)
    assert passes(monkeypatch, replace(request, guidance=1.0), models) == (10, 0)


def test_conditional_only_says_so(models, caplog):
    alone = replace(models, unconditional=None)
    found = generate(SMALL, alone)
    assert "sampling without guidance" in caplog.text
    wanted = generate(replace(SMALL, guidance=1.0), models)
    assert torch.equal(found.latents, wanted.latents)


def test_features_and_noise_stand_in_for_encoder_and_seed(models):
    wanted = generate(SMALL, models)
    features = models.encoder.encode([PROMPT])[0]
    request = replace(SMALL, prompt="", seed=0)
    found = generate(
        request, replace(models, encoder=None), features=features, noise=initial_noise(7, 8, 128)
    )
    assert torch.equal(found.latents, wanted.latents)
    with pytest.raises(OpError, match="neither an encoder nor features"):
        generate(request, replace(models, encoder=None))
    with pytest.raises(OpError, match="noise of the wrong shape"):
        generate(SMALL, models, noise=torch.zeros(1, 7, 128))


def test_image_to_image_starts_between_noise_and_picture(models):
    image = Image.fromarray(
        torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8).numpy(), mode="RGB"
    )
    request = replace(SMALL, preset="default", steps=6, denoise=0.3)
    steps = request.plan()
    assert len(steps) == 6
    assert steps[0].sigma < 0.7
    start = []
    noise = initial_noise(SMALL.seed, 8, 128)
    generate(request, models, None, lambda step, x: start.append(x), init_image=image)
    clean = models.vae.encode(image)
    first = steps[0].sigma * noise + (1 - steps[0].sigma) * clean
    # One Euler step from there is what the callback saw first.
    prepared = module.prepare(models.conditional, 2, 4, models.encoder.encode([PROMPT])[0][None])
    v = module.velocity(models.conditional, first, steps[0].time, prepared)
    u = module.velocity(
        models.unconditional, first, steps[0].time, module.prepare(models.unconditional, 2, 4)
    )
    v = steps[0].guidance * v + (1 - steps[0].guidance) * u
    wanted = first + (steps[0].sigma - steps[0].sigma_next) * v
    assert torch.allclose(start[0], wanted, atol=1e-5)
    larger = image.resize((128, 64))
    assert generate(request, models, init_image=larger).image.size == (64, 32)
    with pytest.raises(OpError, match="needs a picture to start from"):
        generate(request, models)


def test_sizes_that_do_not_fit(models):
    with pytest.raises(OpError, match="no multiple of 16"):
        generate(replace(SMALL, width=100), models)


def test_pairs(tiny):
    first, second = open_pair(tiny.conditional_file, tiny.unconditional_file)
    assert (first.copies, second.copies) == (("conditional",), ("unconditional",))
    assert open_pair(tiny.conditional_file, copies="conditional")[1] is None
    with pytest.raises(CheckpointError, match="--copies conditional"):
        open_pair(tiny.conditional_file)
    with pytest.raises(PairMismatchError):
        open_pair(tiny.conditional_file, tiny.conditional_file)
    with pytest.raises(PairMismatchError):
        open_pair(tiny.unconditional_file, tiny.conditional_file)
    with pytest.raises(PairMismatchError):
        open_pair(tiny.unconditional_file, copies="conditional")


def test_pairs_of_two_sizes(tiny, tmp_path):
    config = CONFIG | {"num_layers": 2}
    metadata = {"model_type": "ideogram4_uncond", "config": json.dumps(config)}
    file = tmp_path / "two-layers.safetensors"
    save_file(canonical_state(random_transformer(5, config)), file, metadata)
    assert open_checkpoint(file).copies == ("unconditional",)
    with pytest.raises(PairMismatchError, match="num_layers 4 against 2"):
        open_pair(tiny.conditional_file, file)


def test_a_picture_of_no_numbers_is_an_error_that_names_the_weight(tiny, models, tmp_path):
    """A file whose headers are whole opens; one NaN would make a black picture."""
    broken = tmp_path / "uncond.gguf"
    quantize_checkpoint(tiny.unconditional_file, "Q4_0", broken)
    data = bytearray(broken.read_bytes())
    data[-4096:] = b"\xff" * 4096  # scales in float16, or floats: NaN
    broken.write_bytes(data)
    pair = open_pair(tiny.conditional_file, broken)
    found = load_pair(pair, models.encoder, models.vae, device="cpu")
    with pytest.raises(OpError, match="unconditional copy holds NaN") as raised:
        generate(SMALL, found)
    state = dict(pair[1].stream("unconditional", dtype=torch.float32))
    dense = getattr(state[raised.value.tensor], "dequantize", lambda: state[raised.value.tensor])()
    assert not dense.isfinite().all()


def test_a_picture_of_no_numbers_from_weights_that_are_numbers(models):
    width = models.conditional.config.llm_features_dim
    with pytest.raises(OpError, match="ran into NaN or infinity"):
        generate(SMALL, models, features=torch.full((5, width), torch.inf))
