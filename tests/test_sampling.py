"""Schedule and guidance against diffusers' and ComfyUI's own functions, to the last bit."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideogram4_quant.checkpoint.config import ModelConfig
from ideogram4_quant.errors import OpError
from ideogram4_quant.pocket import data
from ideogram4_quant.pocket.encoder import FEATURES
from ideogram4_quant.sampling import (
    LAST_SIGMA,
    PRESETS,
    check_size,
    combine,
    euler_step,
    grid_size,
    guidance_schedule,
    plan,
    preset,
    sigmas,
    start_latents,
    step_at,
    trained_sides,
)

SIZES = [(512, 512), (1024, 1024), (2048, 2048), (128, 64), (1536, 640), (16, 16), (2048, 256)]
SHAPES = [*((p.mu, p.std) for p in PRESETS.values()), (-1.3, 0.4)]


def comfyui_sigmas(steps, width, height, mu, std):
    """The formula of ComfyUI's Ideogram4Scheduler, written out in plain Python floats."""
    mean = mu + 0.5 * math.log((width * height) / (512 * 512))
    low, high = 1 / (1 + math.exp(9.0)), 1 / (1 + math.exp(-7.5))
    quantiles = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = [
        min(max(1.0 - float(torch.special.expit(mean + std * torch.special.ndtri(u))), low), high)
        for u in quantiles
    ]
    return torch.tensor([*[1.0 - t for t in reversed(times)][:-1], 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("size", "shape"), [*product(SIZES, SHAPES)])
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 20, 48, 63, 100])
def test_sigmas_equal_diffusers_bit_for_bit(steps, size, shape):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as reference

    (width, height), (mu, std) = size, shape
    mean = reference._resolution_aware_mu(height=height, width=width, base_mu=mu)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=reference._logit_normal_sigmas(steps, mean, std=std).tolist())
    ours = sigmas(steps, width, height, mu, std)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, scheduler.sigmas)


@pytest.mark.parametrize(("size", "shape"), [*product(SIZES, SHAPES)])
def test_sigmas_equal_the_hosts_formula(size, shape):
    ours = sigmas(20, *size, *shape)
    assert torch.equal(ours, comfyui_sigmas(20, *size, *shape).float())


def test_sigmas_descend_from_noise_to_zero():
    for size, shape in product(SIZES, SHAPES):
        values = sigmas(48, *size, *shape)
        assert values.shape == (49,)
        assert (values.diff() <= 0).all()
        assert values[-1] == 0
        assert 0.999 < values[0] < 1


def test_denoise_takes_the_tail_of_a_longer_schedule():
    whole = sigmas(40, 1024, 1024, 0.0, 1.75)
    part = sigmas(20, 1024, 1024, 0.0, 1.75, denoise=0.5)
    assert torch.equal(part, whole[-21:])
    assert sigmas(20, 1024, 1024, 0.0, 1.75, denoise=0.6).shape == (21,)


@pytest.mark.parametrize("denoise", [0.0, -0.1, 1.01])
def test_denoise_out_of_range(denoise):
    with pytest.raises(OpError, match="denoise"):
        sigmas(20, 512, 512, 0.0, 1.75, denoise=denoise)


def test_presets_are_the_references_table():
    assert {n: (p.steps, p.mu, p.std) for n, p in PRESETS.items()} == {
        "quality": (48, 0.0, 1.5),
        "default": (20, 0.0, 1.75),
        "turbo": (12, 0.5, 1.75),
        # not the reference's: fal's, see the tooltip of what is not settled
        "instant": (8, 0.0, 1.75),
        "fast": (20, 0.0, 1.75),
        "turbotime": (4, 0.0, 1.75),
    }
    assert PRESETS["quality"].guidance == (7.0,) * 45 + (3.0,) * 3
    assert PRESETS["default"].guidance == (7.0,) * 18 + (3.0,) * 2
    assert PRESETS["turbo"].guidance == (7.0,) * 11 + (3.0,) * 1


def test_quality_is_the_pipelines_default():
    import inspect

    from diffusers import Ideogram4Pipeline

    defaults = inspect.signature(Ideogram4Pipeline.__call__).parameters
    quality = PRESETS["quality"]
    assert quality.guidance == tuple(defaults["guidance_schedule"].default)
    assert quality.steps == defaults["num_inference_steps"].default
    assert (quality.mu, quality.std) == (defaults["mu"].default, defaults["std"].default)


def test_custom_steps_keep_the_number_of_polish_steps():
    assert guidance_schedule("quality", steps=30) == (7.0,) * 27 + (3.0,) * 3
    assert guidance_schedule("turbo", steps=4) == (7.0,) * 3 + (3.0,)
    assert guidance_schedule("quality", steps=3) == (7.0, 3.0, 3.0)
    assert guidance_schedule("quality", steps=1) == (7.0,)


def test_constant_and_given_guidance():
    assert guidance_schedule("default", guidance=4) == (4.0,) * 20
    assert guidance_schedule("default", steps=3, guidance=[5, 4, 3]) == (5.0, 4.0, 3.0)
    with pytest.raises(OpError, match="found 2, needed 3"):
        guidance_schedule("default", steps=3, guidance=[5, 4])
    with pytest.raises(OpError, match="needed quality, default, turbo, instant"):
        guidance_schedule("swift")


def test_presets_of_one_branch_never_guide():
    for name, steps in (("instant", 8), ("fast", 20), ("turbotime", 4)):
        assert guidance_schedule(name) == (1.0,) * steps == PRESETS[name].guidance
        assert guidance_schedule(name, steps=3) == (1.0,) * 3
        curve = sigmas(steps, 512, 512, 0.0, 1.75)
        assert {s.unconditional for s in plan(curve, PRESETS[name].guidance)} == {"skip"}
    assert preset("Instant 8") is PRESETS["instant"]
    assert preset("turbotime 4 (with its lora)") is PRESETS["turbotime"]


def test_schedule_may_end_where_the_clamp_does():
    # 1 - 1 / (1 + exp(-7.5)) in fp64, as the reference's clamp of the logSNR leaves it
    kept = sigmas(8, 1024, 1024, 0.0, 1.75, last=LAST_SIGMA)
    assert kept[-1] == torch.tensor(1.0 - 1.0 / (1.0 + math.exp(-7.5)), dtype=torch.float32)
    assert torch.equal(kept[:-1], sigmas(8, 1024, 1024, 0.0, 1.75)[:-1])
    with pytest.raises(OpError, match="last sigma"):
        sigmas(8, 1024, 1024, 0.0, 1.75, last=0.1)


def test_plan_runs_both_copies_at_every_step_by_default():
    preset = PRESETS["default"]
    steps = plan(sigmas(20, 512, 512, 0.0, 1.75), preset.guidance)
    assert [s.unconditional for s in steps] == ["run"] * 20
    assert [s.guidance for s in steps] == list(preset.guidance)
    assert [s.sigma for s in steps[1:]] == [s.sigma_next for s in steps[:-1]]
    assert steps[-1].sigma_next == 0.0
    assert steps[3].time == 1.0 - steps[3].sigma


def test_plan_skips_the_unconditional_copy_at_guidance_one():
    steps = plan([1.0, 0.5, 0.2, 0.0], [7.0, 1.0, 3.0])
    assert [s.unconditional for s in steps] == ["run", "skip", "run"]


def test_plan_interval_is_counted_in_steps():
    ten = [1 - i / 10 for i in range(11)]
    steps = plan(ten, [7.0] * 10, interval=(0.2, 0.5))
    assert [s.guidance for s in steps] == [1, 1, 7, 7, 7, 1, 1, 1, 1, 1]
    assert [s.unconditional for s in steps].count("run") == 3


def test_plan_reuses_a_prediction_for_as_many_steps_as_asked():
    ten = [1 - i / 10 for i in range(11)]
    kinds = [s.unconditional for s in plan(ten, [7.0] * 10, reuse=3)]
    assert kinds == ["run", "reuse", "reuse"] * 3 + ["run"]
    # Steps without guidance age a prediction too: it is not used when it is 3 steps old.
    kinds = [s.unconditional for s in plan(ten[:6], [7.0, 1.0, 1.0, 7.0, 7.0], reuse=3)]
    assert kinds == ["run", "skip", "skip", "run", "reuse"]


@given(
    count=st.integers(1, 60),
    reuse=st.integers(1, 9),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple),
)
@settings(max_examples=60, deadline=None)
def test_plan_never_reuses_what_was_not_run(count, reuse, bounds):
    steps = plan(
        [1 - i / count for i in range(count + 1)], [7.0] * count, interval=bounds, reuse=reuse
    )
    age = None
    for step in steps:
        assert (step.unconditional == "skip") == (step.guidance == 1.0)
        age = 0 if step.unconditional == "run" else None if age is None else age + 1
        if step.unconditional == "reuse":
            assert age is not None
            assert age < reuse


def test_plan_refuses_what_does_not_fit():
    with pytest.raises(OpError, match="do not fit"):
        plan([1.0, 0.5, 0.0], [7.0])
    with pytest.raises(OpError, match="interval"):
        plan([1.0, 0.0], [7.0], interval=(0.6, 0.5))
    with pytest.raises(OpError, match="reuse"):
        plan([1.0, 0.0], [7.0], reuse=0)


def test_step_at_finds_the_nearest_sigma():
    steps = plan([1.0, 0.5, 0.2, 0.0], [7.0, 7.0, 3.0])
    assert [step_at(steps, s).index for s in (1.0, 0.5, 0.49, 0.2, 0.0)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("g", [0.0, 1.0, 2.3, 3.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_and_euler_equal_the_pipelines_arithmetic(g, dtype):
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 2, 7, 5).to(dtype)
    x = torch.randn(2, 7, 5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule = sigmas(12, 1024, 768, 0.5, 1.75)
    scheduler.set_timesteps(sigmas=schedule[:-1].tolist())
    weight = torch.as_tensor([g], dtype=torch.float32)[0]
    v = weight * cond.float() + (1.0 - weight) * uncond.float()
    ours = combine(cond, uncond, g)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, v)
    step = plan(schedule, [g] * 12)[0]
    expected = scheduler.step(-v, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(euler_step(x, ours, step.sigma, step.sigma_next), expected)


def test_start_latents_mix_noise_and_picture():
    noise, clean = torch.randn(2, 1, 4, 3)
    assert start_latents(noise, None, 0.4) is noise
    assert torch.equal(start_latents(noise, clean, 0.25), 0.25 * noise + 0.75 * clean)


@pytest.mark.parametrize("size", [(1000, 512), (512, 8), (0, 512), (512, -16)])
def test_sizes_that_are_no_multiples_of_16_fail(size):
    with pytest.raises(OpError, match="no multiple of 16"):
        check_size(*size)


def test_untrained_sizes_only_warn():
    assert check_size(1024, 1024) == []
    assert check_size(2048, 512) == []
    assert any("trained sides" in w for w in check_size(128, 64))
    assert any("trained sides" in w for w in check_size(2064, 1024))


def test_trained_sides_of_the_test_model_are_its_own():
    """Those of its pictures, by the width of its text features."""
    sides = trained_sides(FEATURES)
    assert sides == (data.HEIGHT, data.WIDTH)
    assert check_size(data.WIDTH, data.HEIGHT, sides) == []
    assert check_size(1024, 1024, sides)
    assert trained_sides(ModelConfig().llm_features_dim) == (256, 2048)
    assert any("aspect" in w for w in check_size(2048, 256))
    assert grid_size(1536, 640) == (40, 96)
