"""Error feedback against the textbook's GPTQ, and what every block format makes of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import feedback
from ideogram4_quant.ops.blocks import FORMATS, coded, dequantize, quantize
from ideogram4_quant.ops.codes import Codebook
from ideogram4_quant.ops.feedback import Feedback, output_energy

SEARCHED = [form for form in FORMATS.values() if isinstance(form, coded.CodedFormat)]


def case(n, k, r, seed=0, share=0.7):
    """(weight [N, K], square [K], directions [K, r]): directions explain ``share`` on average."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(k, 1, generator=generator).mul(4).exp()
    directions = torch.randn(k, r, generator=generator) * loudness
    square = directions.square().sum(1) / share + 0.1
    return torch.randn(n, k, generator=generator) * 0.02, square, directions


def gptq(weight, step, shift, covariance, order, limits):
    """Algorithm 1 of arXiv 2210.17323, fp64, a column at a time, on given scales."""
    place = torch.tensor(order)
    inverse = torch.linalg.inv(covariance.double()[place][:, place])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, codes = weight.double()[:, place].clone(), torch.empty_like(weight, dtype=torch.int8)
    run = weight.shape[1] // step.shape[1]
    for j, column in enumerate(order):
        scale, low = step[:, column // run].double(), shift[:, column // run].double()
        code = ((left[:, j] + low) / scale).round().clamp(*limits)
        codes[:, column] = code.to(torch.int8)
        error = (left[:, j] - (scale * code - low)) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@pytest.mark.parametrize(
    ("n", "k", "r", "run"), [(5, 32, 1, 32), (17, 96, 4, 16), (9, 256, 16, 32)]
)
def test_it_is_gptq_for_a_covariance_of_low_rank(n, k, r, run, monkeypatch):
    weight, square, directions = case(n, k, r)
    in_panels = Feedback(square, directions)
    monkeypatch.setattr(feedback, "_OF_ALL", 0)  # every column alone
    follow = Feedback(square, directions)
    covariance = torch.diag(follow.rest.double()) + directions.double() @ directions.double().T
    groups = weight.view(n, -1, run)
    low = groups.amin(2).clamp(max=0)
    step, shift = (groups.amax(2) - low) / 15, -low
    codes, better = follow.round(weight, step, shift, (0, 15))
    assert better.all()
    wanted = gptq(weight, step, shift, covariance, follow.order, (0, 15))
    # A value between two codes may fall to either side in fp32, and the row goes on from there.
    alike = (codes == wanted).all(1)
    assert alike.float().mean() > 0.75
    plain = ((weight.view(n, -1, run) + shift[..., None]) / step[..., None]).round().view(n, k)

    def lost(codes):
        values = codes.view(n, -1, run) * step[..., None] - shift[..., None]
        return output_energy(values.view(n, k) - weight, follow.rest, follow.directions).sum()

    assert lost(codes) == pytest.approx(lost(wanted).item(), rel=0.02)
    assert lost(codes) < 0.8 * lost(plain)
    codes, _ = in_panels.round(weight, step, shift, (0, 15))
    assert lost(codes) == pytest.approx(lost(wanted).item(), rel=0.05)


def test_without_correlation_it_rounds_to_nearest():
    weight, square, _ = case(7, 64, 1)
    step = weight.view(7, 2, 32).abs().amax(2) / 127
    follow = Feedback(square, torch.zeros(64, 3))
    codes, better = follow.round(weight, step, None, (-127, 127))
    assert not better.any()  # nor worse
    assert torch.equal(codes, (weight.view(7, 2, 32) / step[..., None]).round().view(7, 64).char())


def test_directions_never_explain_all_of_a_column():
    _, square, directions = case(1, 64, 4)
    torch.testing.assert_close(Feedback(square, 100 * directions).rest, square / 20)


@pytest.mark.parametrize("form", SEARCHED, ids=lambda form: form.name)
def test_every_format_loses_less_of_the_output(form):
    weight, square, directions = case(24, 512, 8, seed=1)
    follow = Feedback(square, directions)
    data = quantize(weight, form.name, square)
    fed = quantize(weight, form.name, square, feedback=follow)
    blocks, recoded = (each.view(-1, form.type_size) for each in (data, fed))
    for before, after in zip(form.grid(blocks), form.grid(recoded), strict=True):
        assert before is after is None or torch.equal(before, after)  # codes alone have changed
    lost, loses = (
        output_energy(
            dequantize(each, form.name, weight.shape) - weight, follow.rest, follow.directions
        )
        for each in (data, fed)
    )
    assert (loses <= lost).all()
    assert 10 * math.log10(lost.sum() / loses.sum()) > 2


def every_code(form):
    if isinstance(form.code_limits, Codebook):
        return form.code_limits.values
    return range(form.code_limits[0], form.code_limits[1] + 1)


@pytest.mark.parametrize("form", SEARCHED, ids=lambda form: form.name)
def test_codes_and_grid_are_what_decoding_says(form):
    generator = torch.Generator().manual_seed(4)
    blocks = quantize(torch.randn(40, 256, generator=generator), form.name).view(-1, form.type_size)
    codes = torch.tensor(every_code(form))
    picked = torch.randint(len(codes), (len(blocks), form.block_size), generator=generator)
    codes = codes[picked]
    step, shift = form.grid(blocks)
    wanted = codes.view(*step.shape, -1) * step[..., None]
    wanted = (wanted if shift is None else wanted - shift[..., None]).view(codes.shape)
    recoded = form.recode(blocks, codes.char())
    torch.testing.assert_close(
        dequantize(recoded, form.name, codes.shape), wanted, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ4_XS"])
def test_bytes_depend_on_nothing_but_the_arguments(name, monkeypatch):
    weight, square, directions = case(37, 512, 5, seed=2)
    follow = Feedback(square, directions)
    whole = quantize(weight, name, square, feedback=follow)
    rows = torch.stack([quantize(row, name, square, feedback=follow) for row in weight])
    assert torch.equal(rows, whole)
    turned = quantize(weight.flip(0), name, square, feedback=follow)
    assert torch.equal(turned.flip(0), whole)
    monkeypatch.setattr(coded, "FED_BACK", 3 * 512)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(quantize(weight, name, square, feedback=follow), whole)
    finally:
        torch.set_num_threads(threads)
    again = quantize(weight, name, square, feedback=Feedback(square, directions))
    assert torch.equal(again, whole)


def backwards(a, b):
    """``a @ b``, term after term from the last one to the first."""
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for j in reversed(range(len(b))):
        total += a[:, j : j + 1] * b[j]
    return total


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_products_are_exact_in_whatever_order_a_library_sums(scale, monkeypatch):
    weight, square, directions = case(23, 384, 7, seed=5)
    weight[:3] *= torch.tensor([1e-3, 1.0, 1e4])[:, None]
    weight[3, ::50] = 5.0  # outliers: other rows clip
    weight *= scale
    step = weight.view(23, 12, 32).abs().amax(2) / 7
    step[4] /= 8  # most codes are clipped
    follow = Feedback(square * 2.0**-20, directions * 2.0**-10)
    codes, better = follow.round(weight, step, None, (-8, 7))
    assert better[:3].all()
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.copy_(backwards(a, b)))
    monkeypatch.setattr(Tensor, "addmm_", lambda sums, a, b: sums.add_(backwards(a, b)))
    again, better_again = follow.round(weight, step, None, (-8, 7))
    assert torch.equal(again, codes)
    assert torch.equal(better_again, better)


def test_what_is_better_is_what_loses_less_of_the_outputs():
    weight, square, directions = case(64, 256, 6, seed=6, share=0.008)  # hardly anything to gain
    follow = Feedback(square, directions)
    step = weight.abs().amax(1, keepdim=True) / torch.linspace(7, 40, 64)[:, None]
    codes, better = follow.round(weight, step, None, (-8, 7))
    nearest = (weight / step).round().clamp(-8, 7)
    lost, loses = (
        output_energy((each * step - weight).double(), follow.rest, follow.directions)
        for each in (nearest, codes)
    )
    assert 8 < better.sum() < 56
    assert torch.equal(better, loses < 0.999 * lost)


def test_rows_of_zeros_and_steps_of_zero_get_the_codes_of_zero():
    weight, square, directions = case(4, 64, 3, seed=8)
    weight[0] = 0
    step = weight.view(4, 2, 32).abs().amax(2) / 7
    step[1, 0] = 0
    codes, better = Feedback(square, directions).round(weight, step, None, (-8, 7))
    assert not codes[0].any()
    assert not better[0]
    assert not codes[1, :32].any()
    assert codes[1, 32:].any()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), name=st.sampled_from([f.name for f in SEARCHED]))
def test_rows_of_any_kind_lose_no_more_than_without(seed, name):
    weight, square, directions = case(6, 256, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    weight[0] = 0
    weight[1, torch.randint(256, (3,), generator=generator)] = 30.0  # outliers: other codes clip
    weight[2] = 1e-12
    square[::7], directions[::7] = 1e-6, 0  # inputs that are hardly ever there
    follow = Feedback(square, directions)
    data = quantize(weight, name, square)
    fed = quantize(weight, name, square, feedback=follow)
    lost, loses = (
        output_energy(dequantize(each, name, weight.shape) - weight, follow.rest, follow.directions)
        for each in (data, fed)
    )
    assert (loses <= lost).all()
    assert dequantize(fed, name, weight.shape).isfinite().all()


def test_what_it_cannot_follow_is_refused():
    square, directions = torch.ones(8), torch.zeros(8, 2)
    no_directions, one = directions[:, :0], directions[:, 0]
    shapes = (square[:4], directions), (square[None], directions), (square, one)
    for wrong in (*shapes, (square, no_directions)):
        with pytest.raises(OpError, match="of each input"):
            Feedback(*wrong)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OpError, match="finite numbers"):
            Feedback(square * bad, directions)
    with pytest.raises(OpError, match="another linear"):
        quantize(torch.zeros(2, 256), "Q4_K", feedback=Feedback(square, directions))
    with pytest.raises(OpError, match="know no importance"):
        quantize(torch.zeros(2, 256), "Q4_K", feedback=Feedback(square, directions), as_ggml=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_expects_as_little_error():
    weight, square, directions = case(65, 512, 8, seed=3)
    follow = Feedback(square, directions)
    here, there = (
        quantize(w, "Q4_K", square, feedback=follow).cpu() for w in (weight, weight.cuda())
    )
    lost, other = (
        output_energy(
            dequantize(each, "Q4_K", weight.shape) - weight, follow.rest, follow.directions
        ).sum()
        for each in (here, there)
    )
    assert other == pytest.approx(lost.item(), rel=0.02)
