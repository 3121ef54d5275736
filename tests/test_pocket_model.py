"""The committed pocket weights in diffusers' own pipeline, and how many words they write."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ideogram4_quant.pocket import comfy_vae, evaluate, export
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.encoder import build_text_model
from ideogram4_quant.pocket.paths import WEIGHTS, dit_path, vae_dir
from ideogram4_quant.pocket.transformer import DEFAULT_GUIDANCE, velocity


@pytest.fixture(scope="module")
def pocket():
    return evaluate.load_pocket()


class LanguageModelHolder(torch.nn.Module):
    """What the pipeline asks of a text encoder: `.language_model`."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, model):
        super().__init__()
        self.language_model = model


@pytest.fixture(scope="module")
def pipeline(pocket):
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline

    made = Ideogram4Pipeline(
        FlowMatchEulerDiscreteScheduler(),
        pocket.vae,
        LanguageModelHolder(pocket.encoder.model),
        pocket.encoder.tokenizer,
        pocket.cond,
        pocket.uncond,
    )
    made.set_progress_bar_config(disable=True)
    return made


def psnr(a, b) -> float:
    error = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / 255
    return -10 * np.log10(max((error**2).mean(), 1e-12))


def test_weights_are_small_and_say_what_they_are():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    distilled = dit_path("one_branch").stat().st_size
    assert distilled < 30e6
    assert sum(p.stat().st_size for p in files) - distilled < 30e6
    for copy in ("cond", "uncond"):
        with safe_open(dit_path(copy), "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            assert file.get_tensor("layers.0.attention.qkv.weight").dtype == torch.bfloat16
        assert metadata["model_type"] == f"ideogram4_{copy}"
        assert json.loads(metadata["config"])["num_layers"] == 4
        assert "embed_image_indicator.weight" in names


def test_canonical_names_and_back(pocket):
    state = pocket.cond.state_dict()
    again = export.from_canonical(export.to_canonical(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_encoder_is_exact_in_bf16(pocket):
    built = build_text_model().state_dict()
    kept = pocket.encoder.model.state_dict()
    assert all(torch.equal(built[k], kept[k]) for k in built)


def test_taps_are_the_pipelines(pipeline, pocket):
    caption = HELD_OUT[0].caption
    features, lengths = pocket.encoder([caption])
    theirs, *_ = pipeline.encode_prompt([caption], 4, 8, 64, torch.device("cpu"))
    assert (theirs[:, 64 - lengths[0] : 64] - features).abs().max() < 1e-5


def test_picture_is_the_pipelines(pipeline, pocket):
    prompt = HELD_OUT[1]
    theirs = pipeline(
        prompt.caption,
        height=64,
        width=128,
        num_inference_steps=20,
        guidance_schedule=list(DEFAULT_GUIDANCE),
        std=1.75,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(prompt.seed),
    ).images[0]
    assert psnr(pocket.paint([prompt])[0], theirs) > 60


def test_another_size_does_not_crash(pipeline):
    picture = pipeline(
        HELD_OUT[0].caption,
        height=96,
        width=160,
        num_inference_steps=2,
        guidance_schedule=None,
        guidance_scale=3.0,
        max_sequence_length=64,
    ).images[0]
    assert picture.size == (160, 96)
    assert np.asarray(picture).std() > 0


def test_comfy_vae_has_the_originals_names_and_order(pocket):
    state = comfy_vae.comfy_vae_state_dict()
    assert state["decoder.mid.attn_1.q.weight"].ndim == 4
    assert "decoder.up.3.block.0.conv1.weight" in state
    assert "encoder.down.0.downsample.conv.weight" in state
    mean = pocket.vae.bn.running_mean
    assert torch.equal(state["bn.running_mean"].view(32, 4), mean.view(4, 32).T)


def test_vae_returns_what_it_is_given(pocket):
    from ideogram4_quant.pocket.train_vae import vae_pictures

    x = vae_pictures("coarse", "test", 0)
    with torch.no_grad():
        again = pocket.vae.decode(pocket.vae.encode(x, return_dict=False)[0].mode()).sample
    assert -10 * torch.log10((again.clamp(-1, 1) - x).square().mean() / 4) > 28
    assert (vae_dir() / "config.json").exists()


def test_held_out_words_are_read(pocket):
    pytest.importorskip("rapidocr")
    prompts = HELD_OUT[:16]
    assert evaluate.words_right(pocket.paint(prompts), prompts).count("") >= 14


@pytest.mark.slow
def test_58_of_64_held_out_words_are_read_and_guidance_matters(pocket):
    pytest.importorskip("rapidocr")
    right = evaluate.words_right(pocket.paint(HELD_OUT), HELD_OUT).count("")
    assert right >= 58
    unguided = evaluate.words_right(pocket.paint(HELD_OUT[:16], (1.0,) * 20), HELD_OUT[:16])
    assert unguided.count("") < 8


def test_seeds_differ(pocket):
    from dataclasses import replace

    prompts = [replace(HELD_OUT[1], seed=s) for s in range(3)]
    pictures = pocket.paint(prompts)
    assert all(psnr(pictures[0], other) < 30 for other in pictures[1:])


def test_velocity_ignores_padding(pocket):
    features, lengths = pocket.encoder([HELD_OUT[0].caption])
    padded = torch.cat([torch.zeros(1, 9, features.shape[2]), features], 1)
    x, t = torch.randn(1, 32, 128), torch.tensor([0.3])
    with torch.no_grad():
        a = velocity(pocket.cond, x, t, features, lengths)
        b = velocity(pocket.cond, x, t, padded, lengths)
    assert (a - b).abs().max() < 1e-5
