"""Prompts, pictures and tokenizer of the pocket model, and its latent map."""

import json
import random

import numpy as np
import pytest
import torch

from ideogram4_quant.pocket import data, latents
from ideogram4_quant.pocket.tokenizer import TEMPLATE
from ideogram4_quant.pocket.transformer import sigmas
from ideogram4_quant.pocket.words import HELD_OUT_WORDS, TRAIN_WORDS


def test_held_out_prompts_are_fixed_and_apart():
    words = [p.word for p in data.HELD_OUT]
    assert len(set(words)) == len(words) == 64
    assert not set(words) & set(TRAIN_WORDS)
    assert len({p.seed for p in data.HELD_OUT}) == 64
    assert data._held_out() == data.HELD_OUT
    assert {p.row for p in data.HELD_OUT} == set(data.ROWS)


def test_training_never_draws_a_held_out_word():
    rng = random.Random(0)
    words = {data.random_prompt(rng, bool(i % 2)).word for i in range(20000)}
    assert not words & set(HELD_OUT_WORDS)


def test_caption_is_json_in_ideograms_key_order():
    caption = json.loads(data.HELD_OUT[0].caption)
    assert list(caption) == ["high_level_description", "compositional_deconstruction"]
    assert list(caption["compositional_deconstruction"]) == ["background", "elements"]
    text = caption["compositional_deconstruction"]["elements"][0]
    assert list(text) == ["type", "text", "desc"]
    assert text["text"] == data.HELD_OUT[0].word


def test_capital_letters_are_tokens_and_captions_short():
    from transformers import AutoTokenizer

    from ideogram4_quant.pocket.paths import encoder_dir

    tokenizer = AutoTokenizer.from_pretrained(encoder_dir())
    for prompt in data.HELD_OUT:
        assert len(tokenizer.tokenize(f'"{prompt.word}"')) == len(prompt.word) + 2
        ids = tokenizer(TEMPLATE.format(prompt.caption))["input_ids"]
        assert len(ids) <= 60
        chat = [{"role": "user", "content": [{"type": "text", "text": prompt.caption}]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == TEMPLATE.format(prompt.caption)


def test_tiles_leave_word_and_shape_alone():
    rng = random.Random(1)
    for prompt in data.HELD_OUT[:16]:
        plain, tiled = data.tiled_pair(prompt, "coarse")
        level = data.ROWS[prompt.row]
        ink = data.word_mask(prompt, level) > 0
        assert np.array_equal(plain[:, ink], tiled[:, ink])
        some = data.tiled_picture(prompt, rng)
        assert ((some == plain) | (some == tiled)).all()


def test_pack_is_undone_by_unpack():
    x = torch.randn(2, 32, 6, 10)
    assert torch.equal(latents.unpack(latents.pack(x), 3, 5), x)


def test_sigmas_are_the_references():
    pytest.importorskip("diffusers")
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import (
        _logit_normal_sigmas,
        _resolution_aware_mu,
    )

    theirs = _logit_normal_sigmas(20, _resolution_aware_mu(64, 128, 0.0), 1.75)
    assert torch.equal(sigmas(20)[:-1], theirs)
