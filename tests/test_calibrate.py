"""Calibration of the pocket model: every linear watched, sick layers found, commands."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ideogram4_quant.checkpoint import open_checkpoint
from ideogram4_quant.cli import main
from ideogram4_quant.engine.calibrate import Prompt, calibrate, watched
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, initial_noise
from ideogram4_quant.engine.loading import open_pair
from ideogram4_quant.engine.transformer import load_transformer, prepare, velocity
from ideogram4_quant.pocket import data, diseases, paths
from ideogram4_quant.pocket.encoder import CaptionEncoder
from ideogram4_quant.quant import Calibration, QuantOptions, quantize_checkpoint
from ideogram4_quant.quant.profiler import ProfilerOptions

OPTIONS = ProfilerOptions(tokens=48, channels=64, alphas=(0.5,), blocks=("Q4_K",))
REQUEST = GenerateRequest("", 128, 64, steps=3)
FILES = paths.dit_path("cond"), paths.dit_path("uncond")
CANDIDATES = (
    *("int8", "int8 smooth 0.5", "int8 rotated", "int8 smooth 0.5 rotated"),
    *("Q4_K", "int8 rotated inputs"),  # the last: rounded inputs alone, the weights as they are
)


@pytest.fixture(scope="module")
def models():
    pair = open_pair(*FILES)
    return Models(*(load_transformer(ck, ck.copies[0]) for ck in pair), None, None)


@pytest.fixture(scope="module")
def prompts():
    texts = [prompt.caption for prompt in data.prompt_batch("calibration", 2)]
    features = load_encoder(paths.encoder_dir()).encode(texts)
    return [Prompt(t, f) for t, f in zip(texts, features, strict=True)]


def measure(models, prompts, **changes):
    choice = {"digests": {"conditional": "a", "unconditional": "b"}, "options": OPTIONS, **changes}
    return calibrate(models, prompts, REQUEST, **choice)


@pytest.fixture(scope="module")
def clean(models, prompts):
    return measure(models, prompts)


def test_every_linear_of_both_copies_is_watched_at_every_step(clean, models, prompts):
    assert clean.layers.keys() == watched(models).keys()
    assert len(clean.layers) == 31 + 30  # the unconditional copy reads no text
    assert clean.times == tuple(sorted(round(step.time, 6) for step in REQUEST.plan()))
    tokens = sum(32 + len(prompt.features) for prompt in prompts) * 3
    assert clean.layer("conditional", "layers.0.attention.qkv").tokens == tokens
    assert clean.layer("unconditional", "layers.0.attention.qkv").tokens == 2 * 32 * 3
    for key, stats in clean.layers.items():
        assert tuple(stats.noise) == tuple(
            name
            for name in CANDIDATES
            if stats.shape[1] % 256 == 0 or name in CANDIDATES[:2] or "rotated" in name
        ), key
        assert all(0 < stats.error(name) < 0.5 for name in stats.noise), key
    assert clean.provenance[0].prompts == 2
    assert clean.provenance[0].steps == 3


def test_runs_over_halves_merge_to_the_run_over_all(clean, models, prompts):
    halves = [measure(models, [prompt], seeds=[i]) for i, prompt in enumerate(prompts)]
    both = halves[0].merge(halves[1])
    assert both.layers.keys() == clean.layers.keys()
    for key, stats in both.layers.items():
        whole = clean.layers[key]
        assert stats.tokens == whole.tokens, key
        assert torch.equal(stats.absmax, whole.absmax), key
        torch.testing.assert_close(stats.square_sum, whole.square_sum, rtol=1e-12, atol=0)
        scale = whole.sketch.abs().max().item()
        torch.testing.assert_close(stats.sketch, whole.sketch, rtol=0, atol=1e-5 * scale)


def sick_models(disease, strength, layers, encoder=None):
    """The conditional copy with a disease in ``layers`` alone, with the healthy other copy."""
    state = load_file(paths.dit_path("cond"))
    sick = diseases.infect(state, disease, strength, encoder=encoder)
    for name in state:
        if name.startswith("layers.") and int(name.split(".")[1]) not in layers:
            sick[name] = state[name]
    return sick


class Opened:
    """What `load_transformer` asks of a checkpoint, over a state dict."""

    def __init__(self, state, config):
        self.paths, self._state, self._config = ("sick",), state, config
        self.config = self

    def to_dict(self):
        return dict(self._config)

    def stream(self, copy, **_):
        yield from self._state.items()


def test_channels_made_loud_in_one_layer_are_found_there(models, prompts, clean):
    state = sick_models("channels", diseases.STRESS["channels"], {2})
    opened = Opened(state, diseases.sick_config("channels"))
    sick = measure(Models(load_transformer(opened), models.unconditional, None, None), prompts)
    (first, error), (_, second) = sick.ranking("int8")[:2]
    assert first == "conditional.layers.2.feed_forward.w2"
    assert error > 4 * second
    stats, healthy = sick.layers[first], clean.layers[first]
    assert stats.kurtosis > 5 * healthy.kurtosis
    # smoothing takes away what was planted, a rotation alone does not
    assert stats.sqnr_db("int8 smooth 0.5") > stats.sqnr_db("int8 rotated") + 20
    assert stats.sqnr_db("int8 smooth 0.5 rotated") > 35
    others = [key for key in sick.layers if key != first and ".layers.2." not in key]
    for key in others:
        assert sick.layers[key].sqnr_db("int8") == pytest.approx(
            clean.layers[key].sqnr_db("int8"), abs=0.5
        ), key


@pytest.mark.parametrize("strength", ["MODERATE", "STRESS"])
def test_tokens_made_loud_are_found_in_every_w2(models, prompts, clean, strength):
    encoder = CaptionEncoder(paths.encoder_dir())
    value = diseases.MODERATE if strength == "MODERATE" else diseases.STRESS["tokens"]
    state = sick_models("tokens", value, range(4), encoder)
    opened = Opened(state, diseases.sick_config("tokens"))
    sick = measure(Models(load_transformer(opened), models.unconditional, None, None), prompts)
    w2 = [f"conditional.layers.{i}.feed_forward.w2" for i in range(4)]
    lost = {k: clean.layers[k].sqnr_db("int8") - sick.layers[k].sqnr_db("int8") for k in w2}
    if strength == "STRESS":
        assert {key for key, _ in sick.ranking("int8")[:4]} == set(w2)
        assert min(lost.values()) > 10
        assert all(sick.layers[k].kurtosis > 5 * clean.layers[k].kurtosis for k in w2)
    else:  # moderate ones hide behind the outliers that a layer has of its own
        assert min(lost.values()) > 0
        assert max(lost.values()) > 1
        assert all(sick.layers[k].kurtosis > 1.05 * clean.layers[k].kurtosis for k in w2)


def test_files_made_by_calibration_are_more_faithful_than_fixed_recipes(models, prompts, tmp_path):
    """One pass of a sick copy as each recipe stores it, against the same in bf16."""
    state = sick_models("channels", diseases.MODERATE, range(4))
    reference = load_transformer(Opened(state, diseases.sick_config("channels")))
    calibration = measure(Models(reference, models.unconditional, None, None), prompts)
    source = tmp_path / "sick.safetensors"
    with safe_open(FILES[0], "pt") as file:
        save_file(state, source, file.metadata())
    x = initial_noise(3, 32, 128)

    def predict(model):
        return velocity(model, x, 0.4, prepare(model, 4, 8, prompts[0].features[None]))

    wanted, found = predict(reference), {}
    for name, (level, options) in {
        "naive": ("INT8 W8A8", {}),
        "rotated": ("INT8 W8A8 rotated", {}),
        "paper": ("INT8 W8A8", {"alpha": 0.5, "protect_share": 17 / 211}),
        "auto": ("INT8 W8A8 rotated", {"treatment": "auto"}),
        "native, protected": (
            "INT8 W8A8 rotated", {"treatment": "auto-native", "protect_below": 36.0},
        ),
    }.items():  # fmt: skip
        out = tmp_path / f"{name}.safetensors"
        quantize_checkpoint(
            source, level, out, options=QuantOptions(calibration=calibration, **options)
        )
        made = open_checkpoint(out)
        error = predict(load_transformer(made)) - wanted
        found[name] = -20 * (error.norm() / wanted.norm()).log10().item()
        if name == "native, protected":  # some of the sick ones stay in bf16, and nothing else
            kept = [m for m in made.protected if m.startswith("layers.")]
            assert kept
            assert all(m.endswith("feed_forward.w2") for m in kept)
    assert found["auto"] > found["paper"] + 1
    assert found["paper"] > found["rotated"] + 3 > found["naive"] + 6
    assert found["native, protected"] > found["rotated"] + 3


# ---- commands


ARGUMENTS = [
    "calibrate", str(FILES[0]), "--uncond", str(FILES[1]), "--encoder", str(paths.encoder_dir()),
    "--steps", "2", "--tokens", "16", "--channels", "32", "--alphas", "0.5", "--types", "Q4_K",
]  # fmt: skip


def test_the_commands_write_rank_and_draw(tmp_path, capsys):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert main([*ARGUMENTS, "--limit", "1", "--out", str(first)]) == 0
    more = ["--limit", "1", "--seeds", "5", "--merge", str(first), "--out", str(second)]
    assert main([*ARGUMENTS, *more]) == 0
    capsys.readouterr()
    merged = Calibration.load(second)
    assert [run.seeds for run in merged.provenance] == [(0,), (5,)]
    words = set(data.HELD_OUT_WORDS)
    texts = [prompt.word for prompt in data.prompt_batch("calibration", 64)]
    assert not words & set(texts)

    png = tmp_path / "map.png"
    arguments = ["fragility", str(second), "--of", "int8 rotated", "--worst", "3"]
    assert main([*arguments, "--heatmap", str(png)]) == 0
    table = capsys.readouterr().out
    worst = merged.ranking("int8 rotated")[0]
    assert worst[0] in table
    assert f"{merged.layers[worst[0]].sqnr_db('int8 rotated'):.2f}" in table
    with Image.open(png) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert main(["fragility", str(second), "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)
    assert len(ranking) == 61
    assert ranking[0]["error"] == max(row["error"] for row in ranking)
    assert len(ranking[0]["error_at_steps"]) == 2


def test_wrong_uses_end_before_the_work(tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    out.touch()
    assert main([*ARGUMENTS, "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--out", str(tmp_path / "c.bin")]) == 1
    assert "safetensors" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--out", str(tmp_path / "d.safetensors"), "--limit", "0"]) == 1
    assert "too few prompts" in capsys.readouterr().err
    assert main(["fragility", str(FILES[0])]) == 1
    assert "no calibration" in capsys.readouterr().err
