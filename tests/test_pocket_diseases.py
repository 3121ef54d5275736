"""The diseases: the function stays, int8 breaks, and SmoothQuant heals one of the two."""

import pytest
import torch
from safetensors.torch import load_file

from ideogram4_quant.pocket import diseases, evaluate, export
from ideogram4_quant.pocket.data import HELD_OUT, prompt_batch
from ideogram4_quant.pocket.paths import WEIGHTS, dit_path
from ideogram4_quant.pocket.transformer import build_transformer, velocity

DISEASES = ("channels", "tokens")


@pytest.fixture(scope="module")
def state():
    return load_file(dit_path("cond"))


@pytest.fixture(scope="module")
def encoder():
    return export.load_encoder(WEIGHTS)


def other_copy():
    return load_file(dit_path("uncond"))


def build(state, disease=None, dtype=torch.float32):
    config = diseases.sick_config(disease) if disease else None
    model = build_transformer(config).eval().requires_grad_(False).to(dtype)
    model.load_state_dict({k: v.to(dtype) for k, v in export.from_canonical(state).items()})
    return model


def run(model, encoder, dtype=torch.float32):
    prompts = prompt_batch("disease test", 8)
    features, lengths = encoder([p.caption for p in prompts])
    x = torch.randn(8, 32, 128, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        return velocity(model, x, torch.linspace(0.02, 0.9, 8).to(dtype), features, lengths)


def decibels(truth, other) -> float:
    return (10 * torch.log10(truth.square().mean() / (truth - other).square().mean())).item()


def int8(x, dim):
    scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def quantize_w2(model, smooth_from=None):
    """W8A8 of every w2, per row and per token; SmoothQuant (alpha 0.5) if maxima are given."""
    for i, layer in enumerate(model.layers):
        linear = layer.feed_forward.w2
        factor = torch.ones(linear.in_features)
        if smooth_from is not None:
            columns = linear.weight.abs().amax(0).clamp_min(1e-8)
            factor = (smooth_from[i].clamp_min(1e-8) / columns).sqrt()
        linear.weight.data = int8(linear.weight * factor, 1)
        linear.register_forward_pre_hook(lambda m, args, f=factor: int8(args[0] / f, -1))
    return model


def input_maxima(state, disease, encoder):
    """Largest |input| per channel of every w2."""
    model, seen = build(state, disease), []
    for layer in model.layers:
        layer.feed_forward.w2.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].abs().flatten(0, -2).amax(0))
        )
    run(model, encoder)
    return seen


@pytest.mark.parametrize("disease", DISEASES)
@pytest.mark.parametrize("stress", [False, True])
def test_function_is_unchanged(state, encoder, disease, stress):
    strength = diseases.STRESS[disease] if stress else diseases.MODERATE
    sick = diseases.infect(state, disease, strength, seed=3, encoder=encoder)
    assert all(v.dtype == torch.bfloat16 for v in sick.values())
    truth = run(build(state, dtype=torch.float64), encoder, torch.float64)
    again = run(build(sick, disease, torch.float64), encoder, torch.float64)
    assert decibels(truth, again) > 120
    single = decibels(run(build(state), encoder), run(build(sick, disease), encoder))
    assert single > (110 if stress else 120)


@pytest.mark.parametrize("disease", DISEASES)
def test_same_seed_same_disease(state, disease):
    a, b = (diseases.infect(state, disease, 64.0, seed=1) for _ in range(2))
    other = diseases.infect(state, disease, 64.0, seed=2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], other[k]) for k in a)


def test_tokens_fire_seldom_and_loudly(state, encoder):
    sick = diseases.infect(state, "tokens", 256.0, encoder=encoder)
    model, loud = build(sick, "tokens"), []

    def watch(module, args):
        hidden = args[0].abs().flatten(0, -2)
        usual = hidden[:, : -diseases.EXTRA].mean()
        pairs = hidden[:, -diseases.EXTRA :][:, : 2 * diseases.LOUD_PAIRS]
        loud.append((pairs > 60 * usual).float().mean().item())

    for layer in model.layers:
        layer.feed_forward.w2.register_forward_pre_hook(watch)
    run(model, encoder)
    assert all(0.002 < share < 0.06 for share in loud)


def test_smoothquant_alone_heals_channels_but_not_tokens(state, encoder):
    truth = run(build(state), encoder)
    healthy = decibels(truth, run(quantize_w2(build(state)), encoder))
    left = {}
    for disease in DISEASES:
        sick = diseases.infect(state, disease, 1024.0, encoder=encoder)
        naive = decibels(truth, run(quantize_w2(build(sick, disease)), encoder))
        maxima = input_maxima(sick, disease, encoder)
        left[disease] = decibels(truth, run(quantize_w2(build(sick, disease), maxima), encoder))
        assert naive < healthy - 6
    assert left["channels"] > healthy - 3
    assert left["tokens"] < healthy - 6


@pytest.mark.slow
@pytest.mark.parametrize("disease", DISEASES)
def test_naive_int8_breaks_words_under_stress(state, encoder, disease):
    pytest.importorskip("rapidocr")
    pocket, prompts = evaluate.load_pocket(), HELD_OUT[:16]
    pocket.cond, pocket.uncond = quantize_w2(build(state)), quantize_w2(build(other_copy()))
    healthy = evaluate.words_right(pocket.paint(prompts), prompts).count("")
    strength = diseases.STRESS[disease]
    sick = diseases.infect(state, disease, strength, encoder=encoder)
    pocket.cond = quantize_w2(build(sick, disease))
    sick = diseases.infect(other_copy(), disease, strength)
    pocket.uncond = quantize_w2(build(sick, disease))
    assert evaluate.words_right(pocket.paint(prompts), prompts).count("") <= healthy - 3


def test_unknown_disease_is_named(state):
    with pytest.raises(ValueError, match="Unknown disease 'flu'"):
        diseases.infect(state, "flu", 8.0)
