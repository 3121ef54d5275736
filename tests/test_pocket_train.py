"""Training runs from nothing to files, and goes on exactly where it was cut off."""

from dataclasses import replace

import pytest
import torch

from ideogram4_quant.pocket import evaluate, recipe, train, train_dit, train_vae
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.encoder import CaptionEncoder
from ideogram4_quant.pocket.latents import BN_EPS, LinearLatents


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    work = tmp_path_factory.mktemp("base")
    train.run_base(work)
    return work


@pytest.fixture(scope="module")
def parts(base):
    latents = LinearLatents.load(base / "latents.safetensors")
    return latents, CaptionEncoder(base / "tokenizer")


@pytest.mark.parametrize("name", ["letters", "facts", "cond", "uncond"])
def test_a_stage_goes_on_where_it_was_cut_off(name, parts, tmp_path):
    stage = replace(recipe.TRANSFORMER_STAGES[name], batch=4, warmup=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    once = train_dit.DitTrainer(replace(stage, steps=3), whole, *parts)
    once.run()
    train_dit.DitTrainer(replace(stage, steps=2), halves, *parts).run()
    again = train_dit.DitTrainer(replace(stage, steps=3), halves, *parts)
    assert again.step == 2
    again.run()
    a, b = once.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_every_stage_runs_and_its_files_load(base, tmp_path, monkeypatch):
    stages = {
        k: replace(s, steps=1, batch=2, cooldown=0) for k, s in recipe.TRANSFORMER_STAGES.items()
    }
    monkeypatch.setattr(recipe, "TRANSFORMER_STAGES", stages)
    parts = tuple((kind, part, 1) for kind, part, _ in train_vae.PARTS)
    monkeypatch.setattr(train_vae, "PARTS", parts)
    for name in train.STAGES:
        train.run_stage(base, name, tmp_path)
    pocket = evaluate.load_pocket(tmp_path)
    assert pocket.paint(HELD_OUT[:1], (7.0,))[0].size == (128, 64)


def test_normalised_tokens_have_unit_variance(parts):
    latents, _ = parts
    x = train_vae.vae_pictures("free", "test", 0, size=64)
    tokens = latents.tokens(x)
    assert abs(tokens.var().item() - 1) < 0.2
    assert torch.allclose(latents.std**2, latents.var + BN_EPS)
    error = (latents.picture(tokens) - x).square().mean()
    assert -10 * torch.log10(error / 4) > 25


def test_times_favour_the_start():
    t = train_dit.times(20000, torch.Generator().manual_seed(0), mean=0.0, early=1 / 8)
    assert t.min() >= 0
    assert t.max() <= 1
    assert 0.12 < (t < 0.06).float().mean() < 0.2
