"""What arrives of a linear's error: against differences, going on, and against pictures."""

import json
import math
import random

import pytest
import torch

from ideogram4_quant.checkpoint.canonical import is_linear
from ideogram4_quant.cli import main
from ideogram4_quant.engine.calibrate import Prompt, watched
from ideogram4_quant.engine.encoder import load_encoder
from ideogram4_quant.engine.generate import GenerateRequest, Models, initial_noise, sample
from ideogram4_quant.engine.loading import open_pair
from ideogram4_quant.engine.sensitivity import Probes, measure_sensitivity
from ideogram4_quant.engine.transformer import load_transformer, prepare
from ideogram4_quant.errors import OpError
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.pocket import data, paths
from ideogram4_quant.quant.errors import CalibrationError
from ideogram4_quant.quant.provenance import combined_hash, hash_files
from ideogram4_quant.quant.sensitivity import Sensitivity, Sums

FILES = paths.dit_path("cond"), paths.dit_path("uncond")
REQUEST = GenerateRequest("", 128, 64, steps=2, guidance=3.0)
LONGER = GenerateRequest("", 128, 64, steps=3, guidance=3.0)
DIGESTS = {"conditional": "a", "unconditional": "b"}


@pytest.fixture(scope="module")
def models():
    pair = open_pair(*FILES)
    return Models(*(load_transformer(ck, ck.copies[0], device="cpu") for ck in pair), None, None)


@pytest.fixture(scope="module")
def prompts():
    texts = [prompt.caption for prompt in data.prompt_batch("calibration", 2)]
    features = load_encoder(paths.encoder_dir(), device="cpu").encode(texts)
    return [Prompt(t, f) for t, f in zip(texts, features, strict=True)]


def measured(models, quantized, prompts, request=REQUEST, **changes):
    choice = {"probes": Probes(), "digests": DIGESTS, "settings": {}, **changes}
    return measure_sensitivity(models, quantized, prompts, request, **choice)


def latents(models, prompt, seed=0, request=REQUEST):
    unconditional = prepare(models.unconditional, 4, 8)
    conditional = prepare(models.conditional, 4, 8, prompt.features[None])
    x = initial_noise(seed, 32, models.conditional.config.in_channels)
    *_, (_, x) = sample(models, request.plan(), x, conditional, unconditional)
    return x.double()


@pytest.mark.parametrize(
    "key",
    [
        "conditional.layers.0.attention.o",
        "conditional.layers.2.feed_forward.w2",
        "conditional.layers.1.adaln_modulation",
        "unconditional.layers.3.feed_forward.w1",
    ],
)
def test_what_arrives_of_one_rows_error_is_what_the_picture_changes_by(models, prompts, key):
    """Along the drawn direction, by the difference of two samplings."""
    module = watched(models)[key]
    weight = module.weight.data
    error = torch.zeros_like(weight, dtype=torch.float32)
    # large enough for the difference of two fp32 pictures, which modulation hardly changes
    strength = 5e-2 if "adaln" in key else 5e-3
    error[5] = strength * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(4))
    changed = weight.float() + error
    found = measured(
        models, {key: changed}, prompts[:1], probes=Probes(directions=1, seed=0)
    ).linears[key]
    size = latents(models, prompts[0]).norm()
    ends = []
    for changed in (weight.float() - error, weight.float() + error):
        module.weight.data = changed
        ends.append(latents(models, prompts[0]))
    module.weight.data = weight
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randn(1, 32, 128, generator=generator), initial_noise(0, 32, 128))
    direction = torch.randn(1, 32, 128, generator=generator).double()
    moved = (direction * (ends[1] - ends[0])).sum() / 2 / size
    assert math.exp(found.weight.log_arrived) == pytest.approx(moved.square().item(), rel=0.05)
    assert found.pictures == 1


@pytest.mark.parametrize("limit", [127, 7])
@pytest.mark.parametrize(
    "key",
    ["conditional.layers.1.feed_forward.w2", "unconditional.layers.2.attention.o"],
)
def test_what_arrives_of_rounded_inputs_is_what_the_picture_changes_by(models, prompts, key, limit):
    """Against pictures of rotated inputs rounded by the host's formula, all else exact."""
    module = watched(models)[key]
    weight = module.weight.data
    changed = {key: weight.float().mul(16).round().div(16)}
    probes = Probes(directions=8)
    found = measured(models, changed, prompts[:1], LONGER, probes=probes).linears[key]
    part = found.int8 if limit == 127 else found.int4
    truth, lost, energy = latents(models, prompts[0], request=LONGER), [], []

    def rounded(_, inputs):
        x = rotate(inputs[0], 256)
        step = x.abs().amax(-1, keepdim=True) / limit
        coarse = rotate((x / step).round() * step, 256)
        lost.append(((coarse - inputs[0]) @ weight.float().t()).square().sum().item())
        energy.append((inputs[0] @ weight.float().t()).square().sum().item())
        return (coarse,)

    handle = module.register_forward_pre_hook(rounded)
    painted = latents(models, prompts[0], request=LONGER)
    handle.remove()
    arrived = ((painted - truth).square().sum() / truth.square().sum()).item()
    # of eight random directions; that of the weight's errors would be 2 to 14 dB more
    assert math.exp(part.log_arrived) == pytest.approx(arrived, rel=0.5)
    assert part.error == pytest.approx(sum(lost), rel=0.1)
    assert found.signal == pytest.approx(sum(energy), rel=0.1)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_linear_that_was_not_quantized_is_no_linear_that_does_no_harm(models, prompts, kept):
    """Its gain would be 0, and a size would store it in the fewest bits."""
    key = "conditional.layers.2.feed_forward.w2"
    own = watched(models)[key].weight.data.to(kept)
    with pytest.raises(OpError, match=f"{key}: no error to follow"):
        measured(models, {key: own}, prompts[:1])


def test_sums_without_an_error_are_refused(tmp_path):
    path = tmp_path / "s.json"
    linears = {"conditional.layers.0.feed_forward.w2": Sums(1, 5.0)}
    Sensitivity(linears, DIGESTS).save(path)
    with pytest.raises(CalibrationError, match="sums are not usable"):
        Sensitivity.load(path)


def test_a_run_that_was_broken_off_ends_in_the_same_sums(models, prompts, tmp_path):
    key = "conditional.layers.2.feed_forward.w2"
    quantized = {key: watched(models)[key].weight.data.float().mul(16).round().div(16)}
    whole = measured(models, quantized, prompts)
    kept = []
    measured(models, quantized, prompts[:1], keep=kept.append)
    kept[0].save(tmp_path / "s.json")
    earlier = Sensitivity.load(tmp_path / "s.json")
    again = measured(models, quantized, prompts, earlier=earlier)
    assert again.linears == whole.linears
    assert again.done == ("0", "1")
    with pytest.raises(OpError, match="measured otherwise"):
        measured(models, quantized, prompts, earlier=earlier, settings={"steps": 9})
    with pytest.raises(OpError, match="another shape"):
        measured(models, {key: torch.zeros(3, 3)}, prompts)


def test_what_is_foretold_ranks_random_choices_as_their_pictures_do(models, prompts):
    """Weights of a step each by chance: their rank correlation with the pictures' own errors."""
    linears = {k: m for k, m in watched(models).items() if ".layers." in k}
    true = {key: module.weight.data for key, module in linears.items()}
    chance = random.Random(3)

    def rounded(weight, step):
        size = weight.float().std() * step
        return weight.float().div(size).round() * size

    gains = measured(models, {k: rounded(w, 0.3) for k, w in true.items()}, prompts, LONGER).linears
    truth = [latents(models, prompt, at, LONGER) for at, prompt in enumerate(prompts)]
    foretold, found = [], []
    for _ in range(10):
        steps = {k: chance.choice((0.05, 0.1, 0.2, 0.4)) for k in true}
        foretold.append(
            sum(
                math.exp(gains[k].weight.log_arrived / gains[k].pictures) * (steps[k] / 0.3) ** 2
                for k in true
            )
        )
        for key, module in linears.items():
            module.weight.data = rounded(true[key], steps[key])
        painted = [latents(models, prompt, at, LONGER) for at, prompt in enumerate(prompts)]
        ratios = [
            (((a - b).square().sum() / b.square().sum()).item())
            for a, b in zip(painted, truth, strict=True)
        ]
        found.append(math.prod(ratios))
    for key, module in linears.items():
        module.weight.data = true[key]
    assert rank_correlation(foretold, found) >= 0.9


def rank_correlation(first, second):
    """Spearman's, of values without ties."""
    ranks = [[sorted(v).index(x) for x in v] for v in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def test_by_command_from_quantized_files_to_a_file(tmp_path, capsys):
    against = []
    for copy, source in zip(("conditional", "unconditional"), FILES, strict=True):
        out = tmp_path / f"{copy}.safetensors"
        assert main(["quantize", str(source), "--level", "W4A8", "--out", str(out)]) == 0
        against.append(str(out))
    out = tmp_path / "sens.json"
    words = ["sensitivity", FILES[0], "--uncond", FILES[1], "--encoder", paths.encoder_dir()]
    words += ["--limit", 1, "--steps", 1, "--out", out, "--device", "cpu"]
    words = [str(word) for word in words]
    assert main([*words, "--against", against[0]]) == 1
    assert "no quantized file of the unconditional copy" in capsys.readouterr().err
    assert main([*words, "--against", *against]) == 0
    said = capsys.readouterr().out
    assert "largest" in said
    found = Sensitivity.load(out)
    blocks = [n for n in model_linears() if n.startswith("layers.")]
    assert set(found.linears) == {f"{c}.{n}" for c in DIGESTS for n in blocks}
    assert all(min(sums.gain) > 0 for sums in found.linears.values())
    assert main([*words, "--against", *against]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--against", *against, "--resume"]) == 0
    assert Sensitivity.load(out).linears == found.linears
    capsys.readouterr()
    between, other = f"{tmp_path}/uncond.gguf", f"{tmp_path}/other.safetensors"
    for source, level, made in ((FILES[1], "Q8_0", between), (between, "W4A8", other)):
        assert main(["quantize", str(source), "--level", level, "--out", made]) == 0
    # of the same level, but another file: sums of its errors are not added to these
    assert main([*words, "--against", against[0], other, "--resume"]) == 1
    assert "was measured otherwise" in capsys.readouterr().err
    digests = {c: combined_hash(hash_files([f])) for c, f in zip(DIGESTS, FILES, strict=True)}
    assert found.models == digests  # as quantize --sensitivity wants them
    assert json.loads(out.read_text())["settings"]["directions"] == 1


def model_linears():
    from ideogram4_quant.checkpoint import open_checkpoint

    shapes = open_checkpoint(FILES[0], copy="conditional").shapes("conditional")
    return [name.removesuffix(".weight") for name in shapes if is_linear(name)]
