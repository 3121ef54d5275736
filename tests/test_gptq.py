"""Rounding by all second moments: the textbook's GPTQ, and what a calibration knows of them."""

from __future__ import annotations

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import gptq as exact
from ideogram4_quant.ops.codes import Codebook, Levels
from ideogram4_quant.ops.gptq import ExactFeedback
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.quant.input_moments import InputMoments, block_sums, input_moments, sketch
from ideogram4_quant.quant.layer_stats import LayerStats
from ideogram4_quant.tests.test_feedback import gptq

torch.set_num_threads(1)


def inputs(tokens: int, k: int, r: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [T, K], some channels loud."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(r, k, generator=generator)
    mix[:, ::37] *= 20
    x = torch.randn(tokens, r, generator=generator) @ mix
    return x + torch.randn(tokens, k, generator=generator)


def lost(error: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return ((error.double() @ c.double()) * error.double()).sum(1)


@pytest.mark.parametrize(("n", "k", "run"), [(1, 8, 8), (5, 32, 32), (17, 96, 16), (9, 200, 40)])
def test_it_is_the_textbooks_gptq(n, k, run, monkeypatch):
    monkeypatch.setattr(exact, "_RIDGE", 1e-12)
    x = inputs(4 * k, k, 5)
    c = x.t() @ x / len(x)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    groups = weight.view(n, -1, run)
    low = groups.amin(2).clamp(max=0)
    step, shift = (groups.amax(2) - low) / 15, -low
    follow = ExactFeedback(c)
    codes, better = follow.round(weight, step, shift, (0, 15))
    wanted = gptq(weight, step, shift, c, follow.order, (0, 15))
    assert (codes == wanted).all(1).float().mean() > 0.75
    values = codes.view(n, -1, run) * step[..., None] - shift[..., None]
    plain = ((groups + shift[..., None]) / step[..., None]).round().clamp(0, 15)
    nearest = plain * step[..., None] - shift[..., None]
    by_feedback = lost(values.view(n, k) - weight, c)
    by_nearest = lost(nearest.view(n, k) - weight, c)
    assert torch.equal(better, by_feedback < 0.999 * by_nearest)
    assert by_feedback.sum() < 0.7 * by_nearest.sum() or k == 8


def test_rows_do_not_depend_on_each_other_or_on_threads():
    x = inputs(800, 160, 4)
    weight = torch.randn(33, 160, generator=torch.Generator().manual_seed(2))
    step = weight.view(33, 5, 32).abs().amax(2) / 7
    follow = ExactFeedback(x.t() @ x)
    codes, better = follow.round(weight, step, None, (-7, 7))
    part, part_better = follow.round(weight[5:9], step[5:9], None, (-7, 7))
    assert torch.equal(part, codes[5:9])
    assert torch.equal(part_better, better[5:9])
    torch.set_num_threads(2)
    try:
        assert torch.equal(ExactFeedback(x.t() @ x).round(weight, step, None, (-7, 7))[0], codes)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("levels", ["table", "codebook", "grid"])
def test_levels_of_every_kind(levels):
    """Against a column at a time in plain Python, for two rows."""
    k = 24
    x = inputs(300, k, 3)
    c = (x.t() @ x / 300).double() + torch.eye(k).double() * 1e-3
    weight = torch.randn(2, k, generator=torch.Generator().manual_seed(4))
    step = torch.full((2, 3), 0.3)
    table = [-1.9, -0.7, 0.2, 0.9, 2.1]
    if levels == "codebook":
        given, entries = Codebook((-7, -3, 0, 2, 6)), [-7, -3, 0, 2, 6]
    elif levels == "table":
        given, entries = Levels((0, 4), torch.tensor(table)), table
    else:
        grid = torch.tensor([[3.0, 7.0, 40.0], [5.0, 9.0, 60.0]])
        given, entries = Levels((0, 4), torch.tensor(table), grid), table
    follow = ExactFeedback(c)
    codes, _ = follow.round(weight, step, None, given)
    order = follow.order
    ridge = 1e-4 * c.diagonal().mean()
    turned = (c + torch.eye(k).double() * ridge)[order][:, order]
    root = torch.linalg.cholesky(turned.flip(0, 1)).flip(0, 1)
    for row in range(2):
        errors = []
        for at, column in enumerate(order):
            made = sum(errors[i] * root[i, at] for i in range(at)) / root[at, at]
            target = float(weight[row, column]) + float(made)
            group = column // 8
            place = min(range(5), key=lambda i: abs(entries[i] - target / 0.3))
            level = entries[place]
            if levels == "grid":
                units = float(given.grid[row, group])
                level = max(-127, min(127, round(level * units))) / units
            found = int(codes[row, column])
            assert found == (entries[place] if levels == "codebook" else place)
            errors.append(float(weight[row, column]) - level * 0.3)


@pytest.mark.parametrize("on_grid", [False, True])
def test_steps_refitted_on_the_way(on_grid):
    """Against a column at a time in plain Python: groups stay together, the step is that of the
    largest target."""
    n, k, run = 2, 48, 16
    x = inputs(300, k, 3)
    c = (x.t() @ x / 300).double()
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(4))
    step = torch.full((n, k // run), 0.3)
    table = torch.arange(-3.0, 4.0)
    grid = torch.full((n, k // run), 9.0)
    levels = Levels((0, 6), table, grid) if on_grid else Levels((0, 6), table)
    unit = 0.3 / 9

    def refit(group, target):
        assert target.shape == (n, run)
        largest = target.abs().amax(1) / 3
        return (largest / unit).round() if on_grid else largest

    follow = ExactFeedback(c, run)
    codes, better = follow.round(weight, step, None, levels, refit)
    assert bool(better.all())
    assert bool((grid == 9).all())  # the caller's own
    groups = [column // run for column in follow.order]
    assert groups == [g for i in range(0, k, run) for g in [groups[i]] * run]
    order = follow.order
    root = exact._upper_root(c[order][:, order])
    for row in range(n):
        errors, taken = [], 0.0
        for at, column in enumerate(order):
            feedback = root[:, at] / root[at, at]
            made = sum(errors[i] * float(feedback[i]) for i in range(at))
            target = float(weight[row, column]) + made
            if at % run == 0:  # what all columns of the group are to be, as known by now
                ahead = [
                    float(weight[row, order[j]])
                    + sum(errors[i] * float(root[i, j] / root[j, j]) for i in range(at))
                    for j in range(at, at + run)
                ]
                taken = max(map(abs, ahead)) / 3
                units = round(taken / unit)
                taken = units * unit if on_grid else taken
            place = min(range(7), key=lambda i: abs(i - 3 - target / taken))
            level = round((place - 3) * units) / units if on_grid else place - 3
            assert int(codes[row, column]) == place
            errors.append(float(weight[row, column]) - level * taken)


def test_runs_that_do_not_fill_the_columns():
    with pytest.raises(OpError, match="no whole runs"):
        ExactFeedback(torch.eye(40), 16)


@pytest.mark.parametrize(
    ("moments", "match"),
    [
        (torch.ones(3, 4), "second moments"),
        (torch.full((4, 4), torch.nan), "finite"),
        (torch.diag(torch.tensor([1.0, 0.0])), "above zero"),
        (-torch.ones(3, 3) + 2 * torch.diag(torch.ones(3)) * 1e-3, "above zero"),
        (torch.tensor([[1.0, -9.0], [-9.0, 1.0]]), "negative energy"),
    ],
)
def test_what_is_no_matrix_of_moments_is_refused(moments, match):
    with pytest.raises(OpError, match=match):
        ExactFeedback(moments)


# ---- what a calibration keeps


@pytest.mark.parametrize(("k", "width"), [(96, 96), (96, 512), (96, 32), (100, 32)])
def test_blocks_are_those_of_the_products(k, width):
    x = inputs(50, k, 3)
    sums = block_sums(x, width)
    c = x.t() @ x
    wide = min(width, k)
    assert sums.shape == (-(-k // wide), wide, wide)
    for at, block in enumerate(sums):
        part = c[at * wide : (at + 1) * wide, at * wide : (at + 1) * wide]
        size = len(part)
        assert torch.allclose(block[:size, :size], part, rtol=1e-4, atol=1e-2)
        assert not block[size:].any()
        assert not block[:, size:].any()


def known(x: torch.Tensor, width: int) -> InputMoments:
    square = x.double().square().sum(0)
    return input_moments(square, sketch(x), len(x), block_sums(x, width))


def test_one_block_is_the_whole_matrix():
    x = inputs(300, 64, 3)
    c = (x.t() @ x / 300).double()
    assert torch.allclose(known(x, 64).matrix(), c, rtol=1e-3, atol=1e-3 * c.abs().max())
    factors = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled = known(x, 64).scaled(factors).matrix()
    assert torch.allclose(scaled, c * factors[:, None] * factors, rtol=1e-3, atol=1e-3 * c.max())
    turned = rotate(x, 64)
    wanted = (turned.t() @ turned / 300).double()
    assert torch.allclose(
        known(x, 64).rotated(64).matrix(), wanted, rtol=1e-3, atol=2e-3 * wanted.abs().max()
    )


def test_between_blocks_it_knows_the_directions():
    """Of inputs that are few directions and a little noise the sketch knows nearly all."""
    x = inputs(4000, 96, 4)
    c = (x.t() @ x / len(x)).double()
    found = known(x, 32).matrix()
    assert torch.allclose(found[:32, :32], c[:32, :32], rtol=1e-3, atol=1e-2)
    error = (found - c).norm() / c.norm()
    assert error < 0.02
    alone = InputMoments(known(x, 32).square, known(x, 32).directions)
    spread = (
        torch.diag(alone.rest.double()) + alone.directions.double() @ alone.directions.double().t()
    )
    assert error < (spread - c).norm() / c.norm()


def test_runs_are_added_and_a_run_without_blocks_leaves_none():
    x, y, weight = inputs(80, 64, 3), inputs(50, 64, 3, seed=1), torch.randn(8, 64)

    def stats(rows, width=None):
        found = LayerStats.of(rows, weight)
        return (
            found
            if width is None
            else found.__class__(**{**found.__dict__, "blocks": block_sums(rows, width)})
        )

    both = stats(x, 32).plus(stats(y, 32))
    assert torch.allclose(both.blocks, block_sums(torch.cat([x, y]), 32), rtol=1e-4, atol=1e-2)
    assert stats(x, 32).plus(stats(y)).blocks is None
    assert stats(x, 32).plus(stats(y, 64)).blocks is None


def test_an_unfinished_file_of_other_blocks_is_not_gone_on_with(pocket):
    """Codes depend on them: bytes of the one calibration would stand beside those of the other."""
    from dataclasses import replace

    from ideogram4_quant.quant import plan_quantization
    from ideogram4_quant.quant.stream import fingerprint

    plan = plan_quantization(pocket.conditional_file, "W4A8", "out.safetensors", copy="conditional")
    at = next(i for i, tensor in enumerate(plan.tensors) if tensor.quantized)
    k = plan.tensors[at].shape[1]

    def with_blocks(scale):
        blocks = torch.eye(k)[None] * scale
        inputs = InputMoments(torch.ones(k), torch.zeros(k, 1), blocks)
        tensors = list(plan.tensors)
        tensors[at] = replace(tensors[at], inputs=inputs)
        return fingerprint(replace(plan, tensors=tuple(tensors)), {}, None)

    assert with_blocks(1.0) == with_blocks(1.0)
    assert with_blocks(1.0) != with_blocks(2.0)
