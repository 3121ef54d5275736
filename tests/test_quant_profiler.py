"""The profiler on single linears: its figures against recomputed ones, and what is refused."""

import pytest
import torch

from ideogram4_quant.errors import CheckpointError
from ideogram4_quant.ops.reference import int8_linear, quantize_rows
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant import CalibrationError, LayerStats, Run
from ideogram4_quant.quant.loudest import Loudest
from ideogram4_quant.quant.profiler import Profiler, ProfilerOptions
from ideogram4_quant.quant.treatments import Treatment, smoothing

OPTIONS = ProfilerOptions(tokens=48, channels=64, alphas=(0.5,), blocks=("Q4_K",))


def test_figures_are_those_of_the_inputs():
    """A linear of two calls, everything recomputed from the inputs kept by the test."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(256, 40, bias=False)
    calls = [torch.randn(1, n, 256, generator=generator) for n in (30, 20)]
    calls[1][..., 7] *= 50
    profiler = Profiler({"conditional.layers.0.w": linear}, [0.5, 0.1], OPTIONS)
    for phase in (profiler.statistics, profiler.errors):
        with phase():
            for time, x in zip((0.1, 0.5), calls, strict=True):
                profiler.at(time)
                linear(x)
    linear(calls[0] * 1e6)  # the hooks are gone
    stats = profiler.result(Run({}, "", 1, (0,), 2, 1, 1)).layer("conditional", "layers.0.w")
    x, weight = torch.cat([c[0] for c in calls]), linear.weight.detach()
    assert stats.tokens == 50
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.equal(stats.weight_absmax, weight.abs().amax(0))
    torch.testing.assert_close(stats.moments.square, x.square().mean(0), rtol=1e-5, atol=0)
    wide = x.double()
    kurtosis = (wide - wide.mean()).pow(4).mean() / wide.var(correction=0) ** 2
    assert stats.kurtosis == pytest.approx(kurtosis.item(), rel=1e-5)
    peaks = x.abs().amax(1) / x.abs().median(1).values
    assert stats.largest_peak == pytest.approx(peaks.max().item())
    assert stats.peak_to_median.tolist() == pytest.approx(
        [peaks[:30].mean().item(), peaks[30:].mean().item()], rel=1e-5
    )
    smooth = smoothing([stats], 0.5)
    for name, rows in {
        "int8": weight,
        "int8 smooth 0.5": weight * smooth,
        "int8 rotated": rotate(weight, 256),
        "int8 smooth 0.5 rotated": rotate(weight * smooth, 256),
    }.items():
        q, scale = quantize_rows(rows)
        treatment = Treatment.parse(name)
        assert treatment.name == name
        for column, call in enumerate(calls):
            y = int8_linear(
                call[0], q, scale,
                smooth=None if treatment.alpha is None else smooth,
                rotation=256 if treatment.rotated else None,
            )  # fmt: skip
            wanted = call[0] @ weight.T
            error = ((y - wanted).norm() / wanted.norm()).item()
            assert stats.errors[name][column].item() == pytest.approx(error, rel=1e-3), name
    for column, call in enumerate(calls):  # activations alone: what an exact weight makes of them
        q, scale = quantize_rows(rotate(call[0], 256))
        rounded = rotate(q.float() * scale[:, None], 256)
        error = ((rounded - call[0]) @ weight.T).norm() / (call[0] @ weight.T).norm()
        found = stats.errors["int8 rotated inputs"][column].item()
        assert found == pytest.approx(error.item(), rel=1e-3)


def test_a_prompt_is_smoothed_as_the_others_say():
    """A channel loud in one prompt alone: the error there is of a vector that never heard it."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(256, 40, bias=False)
    prompts = [torch.randn(30, 256, generator=generator) for _ in range(3)]
    prompts[1][:2, 7] *= 200
    profiler = Profiler({"conditional.layers.0.w": linear}, [0.5], OPTIONS)
    for phase in (profiler.statistics, profiler.errors):
        with phase():
            for i, x in enumerate(prompts):
                profiler.sample(i)
                linear(x)
    stats = profiler.result(Run({}, "", 3, (0,), 1, 1, 1)).layer("conditional", "layers.0.w")
    assert torch.equal(stats.absmax, torch.cat(prompts).abs().amax(0))
    weight, noise = linear.weight.detach(), 0.0
    for i, x in enumerate(prompts):
        others = torch.cat([p for j, p in enumerate(prompts) if j != i])
        smooth = smoothing([LayerStats.of(others, weight)], 0.5)
        q, scale = quantize_rows(weight * smooth)
        noise += (int8_linear(x, q, scale, smooth=smooth) - x @ weight.T).square().sum().item()
    assert stats.noise["int8 smooth 0.5"].item() == pytest.approx(noise, rel=1e-3)


def test_autocast_rounds_nothing_that_is_measured():
    generator = torch.Generator().manual_seed(0)
    linear, x = torch.nn.Linear(256, 40), torch.randn(30, 256, generator=generator)

    def measured(enabled):
        profiler = Profiler({"conditional.layers.0.w": linear}, [0.5], OPTIONS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for phase in (profiler.statistics, profiler.errors):
                with phase():
                    linear(x)
        return profiler.result(Run({}, "", 1, (0,), 1, 1, 1)).layer("conditional", "layers.0.w")

    plain, cast = measured(False), measured(True)
    assert torch.equal(cast.sketch, plain.sketch)
    assert torch.equal(cast.signal, plain.signal)
    assert all(torch.equal(cast.noise[name], plain.noise[name]) for name in plain.noise)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_maxima_without_any_one_sample(samples):
    generator = torch.Generator().manual_seed(samples)
    loudest, values = Loudest(7), [torch.zeros(7) for _ in range(samples)]
    for turn in range(40):
        part = torch.rand(7, generator=generator)
        loudest.add(part, turn * 3 % samples)
        values[turn * 3 % samples] = torch.maximum(values[turn * 3 % samples], part)
    assert loudest.samples == samples
    assert torch.equal(loudest.absmax, torch.stack(values).amax(0))
    for i in range(samples):
        others = [each for j, each in enumerate(values) if j != i] or values
        assert torch.equal(loudest.without(i), torch.stack(others).amax(0))


def test_one_sample_alone_is_told(caplog):
    linear = torch.nn.Linear(256, 40)
    profiler = Profiler({"conditional.layers.0.w": linear}, [0.5], OPTIONS)
    with profiler.statistics():
        linear(torch.ones(2, 256))
    with profiler.errors():
        linear(torch.ones(2, 256))
    assert "one prompt" in caplog.text


def test_w1_and_w3_share_their_smoothing():
    x, members = torch.rand(9, 16), [torch.rand(8, 16), 9 * torch.rand(8, 16)]

    stats = [LayerStats.of(x, weight) for weight in members]
    joint = smoothing(stats, 0.5)
    loudest = x.abs().amax(0)
    loudest = loudest.clamp_min(loudest.median())  # what was hardly heard counts as usual
    wanted = (loudest / torch.cat(members).abs().amax(0)).sqrt()
    torch.testing.assert_close(joint, wanted / wanted.log().mean().exp())
    silent = torch.cat([x[:, :8], torch.zeros(9, 8)], dim=1)
    assert smoothing([LayerStats.of(silent, members[0])], 0.5).isfinite().all()


def test_linears_that_are_never_called_are_named():
    called, silent = torch.nn.Linear(16, 4), torch.nn.Linear(16, 4)
    profiler = Profiler(
        {"conditional.layers.0.a": called, "conditional.layers.0.b": silent}, [0.0], OPTIONS
    )
    for phase in (profiler.statistics, profiler.errors):
        with phase():
            called(torch.rand(3, 16))
    with pytest.raises(CalibrationError, match=r"conditional\.layers\.0\.b.*never called"):
        profiler.result(Run({}, "", 1, (0,), 1, 1, 1))


@pytest.mark.parametrize(
    ("where", "value"), [("weight", torch.nan), ("input", torch.nan), ("input", 1e30)]
)
def test_values_that_are_not_finite_are_named(where, value):
    """Nor squares of values, of which sums are kept."""
    linear, x = torch.nn.Linear(16, 4), torch.rand(3, 16)
    (linear.weight.data if where == "weight" else x)[1, 2] = value
    profiler = Profiler({"conditional.layers.0.a": linear}, [0.0], OPTIONS)

    def run():
        for phase in (profiler.statistics, profiler.errors):
            with phase():
                linear(x)
        profiler.result(Run({}, "", 1, (0,), 1, 1, 1))

    with pytest.raises(CheckpointError, match=r"conditional\.layers\.0\.a.*not finite"):
        run()
    assert not linear._forward_pre_hooks
