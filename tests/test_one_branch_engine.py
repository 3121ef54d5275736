"""One branch in the engine and on the command line: no second copy, no guidance, the mark kept."""

from __future__ import annotations

import logging
from importlib import import_module

import pytest
import torch

from ideogram4_quant import cli
from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.engine.generate import GenerateRequest, Models, generate
from ideogram4_quant.engine.loading import load_pair, open_pair
from ideogram4_quant.errors import OpError, PairMismatchError
from ideogram4_quant.pocket.data import HELD_OUT
from ideogram4_quant.pocket.paths import dit_path, encoder_dir, vae_dir
from ideogram4_quant.quant import quantize_checkpoint
from ideogram4_quant.quant.inspect import inspect_file
from ideogram4_quant.tests.test_one_branch_files import renamed

CAPTION = HELD_OUT[0].caption


@pytest.fixture
def instant(tmp_path):
    """The pocket's conditional copy under the name of a one-branch model."""
    return renamed(tmp_path, "ideogram4-instant.safetensors")


def command(model, out, *more: str) -> list[str]:
    return [
        "generate", "--model", str(model), "--encoder", str(encoder_dir()), "--vae", str(vae_dir()),
        "--out", str(out), "--prompt", CAPTION, "--width", "64", "--height", "32", *more,
    ]  # fmt: skip


def test_one_file_is_the_whole_model(instant):
    conditional, unconditional = open_pair(instant)
    assert conditional.one_branch is not None
    assert unconditional is None
    assert open_pair(dit_path("cond"), one_branch=True)[1] is None
    with pytest.raises(PairMismatchError, match="no other copy: it needs no guidance"):
        open_pair(instant, dit_path("uncond"))
    assert open_pair(instant, dit_path("uncond"), one_branch=False)[1] is not None


def models_of(instant, **changed) -> Models:
    found = load_pair(open_pair(instant), None, None, device="cpu", dtype=torch.float32)
    assert found.one_branch
    return Models(**{**vars(found), **changed})


class NoPicture:
    """In a VAE's place where latents are enough."""

    def decode(self, latents, rows, columns):
        return [None]


def features_of(models: Models):
    return torch.zeros(4, models.conditional.config.llm_features_dim)


def test_sampled_without_guidance_and_without_a_warning(instant, caplog):
    models = models_of(instant, vae=NoPicture())
    features = features_of(models)
    with caplog.at_level(logging.WARNING):
        eight = generate(GenerateRequest("", 64, 32, preset="instant"), models, features=features)
        kept = generate(GenerateRequest("", 64, 32, preset="default"), models, features=features)
        fast = generate(GenerateRequest("", 64, 32, preset="fast"), models, features=features)
    assert not caplog.records
    assert [s.guidance for s in eight.steps] == [1.0] * 8
    # the reference's preset runs too, its 7s and 3s left out: Fast has the same sigmas
    assert torch.equal(kept.latents, fast.latents)
    assert {s.unconditional for s in kept.steps} == {"skip"}


def test_guidance_asked_of_one_branch_is_refused(instant):
    models = models_of(instant, vae=NoPicture())
    with pytest.raises(OpError, match="holds it in itself"):
        generate(GenerateRequest("", 64, 32, guidance=7.0), models, features=features_of(models))
    GenerateRequest("", preset="instant", guidance=1.0).plan(one_branch=True)


def test_second_copy_with_a_preset_without_guidance_is_refused(instant):
    models = models_of(instant, vae=NoPicture())
    two = Models(models.conditional, models.conditional, None, NoPicture())
    request = GenerateRequest("", 64, 32, preset="instant")
    with pytest.raises(
        OpError, match=r"runs without guidance.*Leave --uncond and --uncond-lora out"
    ):
        generate(request, two, features=features_of(models))


def test_preset_without_its_model_warns(instant, caplog):
    models = models_of(instant, vae=NoPicture(), one_branch=False)
    request = GenerateRequest("", 64, 32, preset="turbotime")
    with caplog.at_level(logging.WARNING):
        generate(request, models, features=features_of(models))
    assert "made for the TurboTime LoRA" in caplog.text


def test_command_needs_no_second_file(instant, tmp_path, capsys, caplog):
    out = tmp_path / "a.png"
    with caplog.at_level(logging.WARNING):
        assert cli.main(command(instant, out, "--preset", "instant")) == 0
    printed = capsys.readouterr()
    assert "8 steps" in printed.out
    assert "one branch, without guidance (the name ideogram4-instant.safetensors" in printed.out
    assert "guidance" not in caplog.text
    more = ["--preset", "instant", "--overwrite", "--uncond", str(dit_path("uncond"))]
    assert cli.main(command(instant, out, *more)) == 1
    assert "Leave --uncond and --uncond-lora out" in capsys.readouterr().err
    schedule = ["--mu", "0.5", "--last-sigma", "5.52e-4", "--overwrite"]
    assert cli.main(command(instant, out, "--preset", "instant", *schedule)) == 0


@pytest.mark.parametrize("preset", [[], ["--preset", "default"]])
@pytest.mark.parametrize(
    "stand_in",
    [["--uncond", "self"], ["--uncond-lora", str(dit_path("uncond"))]],
    ids=["self", "lora"],
)
def test_stand_in_for_a_second_copy_is_refused_before_a_weight_loads(
    instant, tmp_path, capsys, monkeypatch, preset, stand_in
):
    """The hint was to pick the preset default, which does not help."""
    commands = import_module("ideogram4_quant.engine.commands")
    monkeypatch.setattr(commands, "load_pair", None)
    monkeypatch.setattr(commands, "load_encoder", None)
    assert cli.main(command(instant, tmp_path / "a.png", *preset, *stand_in)) == 1
    said = capsys.readouterr().err
    assert "the model is of one branch, which needs no guidance" in said
    assert "Leave --uncond and --uncond-lora out" in said
    assert "--branches two" in said
    assert "pick the preset" not in said


def test_word_on_the_command_line_goes_before_the_name(instant, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert cli.main(command(instant, out, "--branches", "two")) == 1
    assert "guidance needs both copies" in capsys.readouterr().err
    plain = dit_path("cond")
    assert cli.main(command(plain, out, "--branches", "one", "--steps", "1")) == 0


@pytest.mark.parametrize("level", ["Q8_0", "INT8 W8A8 rotated"])
def test_writers_keep_the_mark(instant, tmp_path, level):
    out = tmp_path / ("made.gguf" if level == "Q8_0" else "made.safetensors")
    quantize_checkpoint(instant, level, out)
    found = open_checkpoint(out).one_branch
    assert found.certain
    assert found.reason == "metadata ideogram4.guidance is 'none'"
    said = inspect_file(out)
    assert said.one_branch == found.reason
    assert "none: one branch" in said.table()
    pair = tmp_path / ("pair" + out.suffix)
    quantize_checkpoint(dit_path("cond"), level, pair)
    assert open_checkpoint(pair).one_branch is None
    assert inspect_file(pair).one_branch is None


def test_compare_takes_levels_of_one_branch(instant, tmp_path, capsys):
    q8 = tmp_path / "ideogram4-instant-Q8_0.gguf"
    quantize_checkpoint(instant, "Q8_0", q8)
    (tmp_path / "p.txt").write_text(CAPTION + "\n")
    words = [
        "compare", "--out", str(tmp_path / "out"), "--system", f"bf16={instant}", "--system",
        f"q8={q8}", "--encoder", str(encoder_dir()), "--vae", str(vae_dir()), "--prompts",
        str(tmp_path / "p.txt"), "--width", "64", "--height", "32", "--preset", "instant",
    ]  # fmt: skip
    assert cli.main(words) == 0
    assert "q8" in capsys.readouterr().out
    words[words.index(f"q8={q8}")] = f"q8={q8},{dit_path('uncond')}"
    assert cli.main(words) == 1
    assert "the preset instant runs without guidance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "more", "words"),
    [
        (",self", [], "one branch, which needs no guidance"),
        (f",{dit_path('uncond')}", [], "no other copy: it needs no guidance"),
        ("", ["--guidance", "3"], "holds it in itself"),
    ],
)
def test_compare_refuses_a_system_before_it_renders_another(
    instant, tmp_path, capsys, monkeypatch, second, more, words
):
    """It was said after all pictures of the systems before it."""
    workers = import_module("ideogram4_quant.engine.compare.workers")
    monkeypatch.setattr(workers, "render_unit", None)
    (tmp_path / "p.txt").write_text(CAPTION + "\n")
    command = [
        "compare", "--out", str(tmp_path / "out"), "--system",
        f"two={dit_path('cond')},{dit_path('uncond')}", "--system", f"one={instant}{second}",
        "--encoder", str(encoder_dir()), "--vae", str(vae_dir()), "--prompts",
        str(tmp_path / "p.txt"), "--width", "64", "--height", "32",
    ]  # fmt: skip
    assert cli.main([*command, *more]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("word", "steps"), [("instant", 8), ("fast", 20), ("turbotime", 4)])
def test_a_models_own_preset_is_the_default(tmp_path, capsys, word, steps):
    """The steps that fal and the LoRA's author state, without --preset."""
    model = renamed(tmp_path, f"ideogram-v4-{word}.safetensors")
    assert cli.main(command(model, tmp_path / "a.png")) == 0
    assert f", {steps} steps" in capsys.readouterr().out
    assert cli.main(command(model, tmp_path / "b.png", "--preset", "turbo")) == 0
    assert ", 12 steps" in capsys.readouterr().out


def test_calibrating_takes_the_models_own_preset_too(instant, tmp_path, capsys):
    out = tmp_path / "cal.safetensors"
    words = ["calibrate", str(instant), "--encoder", str(encoder_dir()), "--out", str(out)]
    small = ["--limit", "1", "--width", "64", "--height", "32", "--moments", "0"]
    assert cli.main([*words, *small]) == 0
    assert "8 times" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["Q8_0", "INT8 W8A8 rotated"])
def test_writers_keep_the_preset(instant, tmp_path, level):
    out = tmp_path / ("made.gguf" if level == "Q8_0" else "made.safetensors")
    quantize_checkpoint(instant, level, out)
    assert open_checkpoint(out).one_branch.preset == "instant"
