"""The torch formulas against exact integers, comfy-kitchen and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import reference as ref
from ideogram4_quant.ops.rotation import GROUPS, hadamard, largest_group, rotate
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

LONG_GROUPS = (1024, 4096)  # of other writers; the kernels have none so long
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1, 1, 1), (1, 16, 64), (3, 63, 100), (17, 5, 255), (33, 40, 2000), (64, 128, 256)]


def randint8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


# ---- quantize_rows


@pytest.mark.parametrize("dtype", list(EPS))
def test_quantize_rows_reaches_127_and_is_half_a_step_close(dtype):
    magnitudes = torch.logspace(-4, 4, 7) if dtype == torch.float16 else torch.logspace(-20, 20, 7)
    x = (randn(7, 333) * magnitudes[:, None]).to(dtype)
    q, scale = ref.quantize_rows(x)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (7,)
    assert (q.abs().amax(1) == 127).all()
    error = (q.float() * scale[:, None] - x.float()).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()


def test_quantize_rows_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    q, scale = ref.quantize_rows(x)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_quantize_rows_flattens_leading_dimensions():
    x = randn(2, 3, 4, 50)
    q, scale = ref.quantize_rows(x)
    assert q.shape == (24, 50)
    q2, scale2 = ref.quantize_rows(x.reshape(24, 50))
    assert torch.equal(q, q2)
    assert torch.equal(scale, scale2)


def test_zero_rows_get_a_safe_scale():
    x = torch.zeros(3, 40)
    x[1] = 1e-38
    q, scale = ref.quantize_rows(x)
    assert (scale == torch.tensor(ref.SCALE_FLOOR)).all()
    assert not q.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rotation", [None, 16])
def test_a_row_that_is_not_finite_spoils_itself_alone(bad, rotation):
    x, w = randn(5, 64), randn(9, 64, seed=1)
    q, scale = ref.smooth_rotate_quantize_rows(w, None, rotation)
    clean = ref.int8_linear(x, q, scale, rotation=rotation)
    x[2, 33] = bad
    rows_q, rows_scale = ref.smooth_rotate_quantize_rows(x, None, rotation)
    assert rows_scale[2].isnan()
    assert not rows_q[2].any()
    out = ref.int8_linear(x, q, scale, rotation=rotation)
    assert out[2].isnan().all()
    kept = [0, 1, 3, 4]
    assert torch.equal(out[kept], clean[kept])


def test_rows_without_values_are_refused():
    with pytest.raises(OpError, match="without values"):
        ref.quantize_rows(torch.zeros(3, 0))


# ---- the integer product and its epilogue


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int32_product_is_exact(m, n, k):
    q, w = randint8(m, k), randint8(n, k, seed=1)
    want = q.to(torch.int64) @ w.to(torch.int64).t()
    assert torch.equal(ref.int32_product(q, w).to(torch.int64), want)


def test_int32_product_is_exact_at_the_worst_case():
    q = torch.full((2, 12288), -128, dtype=torch.int8)
    assert (ref.int32_product(q, q) == 128 * 128 * 12288).all()
    assert (ref.int32_product(q, q.neg().clamp_min(127)) == -128 * 127 * 12288).all()


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale_shape", [(-1,), (-1, 1)])
def test_int8_gemm_is_within_two_eps(dtype, with_bias, scale_shape):
    q, w = randint8(19, 513), randint8(37, 513, seed=1)
    scale_x, scale_w = randn(19).abs() * 1e-2, randn(37, seed=2).abs() * 1e-2
    bias = randn(37, seed=3) if with_bias else None
    got = ref.int8_gemm(q, scale_x, w, scale_w.reshape(scale_shape), bias, dtype)
    assert got.dtype == dtype
    want = (q.double() @ w.double().t()) * scale_x.double()[:, None] * scale_w.double()
    bound = want.abs() * 2
    if with_bias:
        want, bound = want + bias.double(), bound + 2 * bias.abs()
    assert ((got.double() - want).abs() <= bound * EPS[dtype]).all()


# ---- rotation


@pytest.mark.parametrize("group", [*GROUPS, 1024])
def test_hadamard_is_symmetric_orthogonal_and_regular(group):
    h = hadamard(group, "cpu", torch.float64)
    assert torch.equal(h, h.t())
    assert torch.equal(h @ h, torch.eye(group, dtype=torch.float64))
    assert (h.abs() == group**-0.5).all()
    assert torch.equal(h.sum(0).abs(), torch.ones(group, dtype=torch.float64))


@pytest.mark.parametrize("group", [*GROUPS, *LONG_GROUPS])
def test_hadamard_is_that_of_comfy_kitchen(group):
    int8_utils = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    want = int8_utils._build_hadamard(group, dtype=torch.float32)
    assert torch.equal(hadamard(group, "cpu", torch.float32), want)


@pytest.mark.parametrize("group", [*GROUPS, *LONG_GROUPS])
@pytest.mark.parametrize("dtype", [torch.float64, *EPS])
def test_rotate_is_the_grouped_product_and_its_own_inverse(group, dtype):
    x = randn(3, 5, 3 * group, dtype=dtype)
    h = hadamard(group, "cpu", torch.float64)
    want = (x.double().reshape(3, 5, 3, group) @ h).reshape(x.shape)
    got = rotate(x, group)
    assert got.dtype == dtype
    assert got.shape == x.shape
    eps = EPS.get(dtype, 2.0**-52)
    assert (got.double() - want).abs().max() <= 8 * eps * want.abs().max()
    assert (rotate(got, group).double() - x.double()).abs().max() <= 16 * eps * x.abs().max()


def test_rotate_takes_strided_input():
    x = randn(64, 6)
    assert torch.equal(rotate(x.t(), 16), rotate(x.t().contiguous(), 16))
    rows = randn(5, 600)[:, 100:356]  # one group wide
    assert torch.equal(rotate(rows, 256), rotate(rows.contiguous(), 256))


def test_rotate_works_inside_and_outside_inference_mode():
    with torch.inference_mode():
        rotate(randn(2, 64), 64)
    x = randn(2, 64).requires_grad_()
    rotate(x, 64).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)


def test_rotate_names_what_is_wrong():
    with pytest.raises(OpError, match=r"in_features 100.*multiple of 16"):
        rotate(randn(2, 100), 16)
    with pytest.raises(OpError, match="found 12"):
        rotate(randn(2, 48), 12)
    with pytest.raises(OpError, match=r"torch\.int8"):
        rotate(randint8(2, 64), 64)


@pytest.mark.parametrize(
    ("k", "group"), [(4608, 256), (128, 64), (48, 16), (12, 4), (7, None), (53248, 256)]
)
def test_largest_group(k, group):
    assert largest_group(k) == group


# ---- int8_linear


def quantized(w, smooth=None, rotation=None):
    scaled = w if smooth is None else w * smooth
    return ref.smooth_rotate_quantize_rows(scaled, None, rotation)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear_equals_comfy_kitchen(m, n, k, with_bias):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x, w = randn(m, k), randn(n, k, seed=1)
    bias = randn(n, seed=2) if with_bias else None
    q, scale = quantized(w)
    ck_q, ck_scale = eager.quantize_int8_rowwise(w)
    assert torch.equal(q, ck_q)
    assert torch.equal(scale[:, None], ck_scale)
    want = eager.int8_linear(x, q, scale, bias, torch.float32)
    got = ref.int8_linear(x, q, scale, bias)
    bound = 2 * EPS[torch.float32] * (want.abs() + (0 if bias is None else 2 * bias.abs()))
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("group", [*GROUPS, *LONG_GROUPS])
def test_convrot_linear_equals_comfy_kitchen(group):
    """With small integers the rotation is exact, so the int8 values have to agree exactly."""
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    k = 3 * group if group > 4 else 60
    generator = torch.Generator().manual_seed(group)
    x = torch.randint(-8, 9, (13, k), generator=generator).float()
    w = torch.randint(-8, 9, (21, k), generator=generator).float()
    bias = randn(21)
    ck_q, ck_scale = eager.quantize_int8_convrot_weight(w, group)
    q, scale = quantized(w, rotation=group)
    assert torch.equal(q, ck_q)
    assert torch.equal(scale[:, None], ck_scale)
    want = eager.int8_linear(x, q, scale, bias, torch.float32, True, group)
    got = ref.int8_linear(x, q, scale, bias, rotation=group)
    assert ((got - want).abs() <= 2 * EPS[torch.float32] * (want.abs() + 2 * bias.abs())).all()


@pytest.mark.parametrize("rotation", [None, 64])
@pytest.mark.parametrize("dtype", list(EPS))
def test_smoothing_and_rotation_cancel(rotation, dtype):
    """Outlier channels smoothed and rotated away: as close to fp32 as int8 gets."""
    x, w = randn(2, 25, 192), randn(31, 192, seed=1)
    x[..., ::24] *= 50
    smooth = x.abs().amax((0, 1)).sqrt()
    q, scale = quantized(w, smooth, rotation)
    got = ref.int8_linear(x.to(dtype), q, scale, smooth=smooth, rotation=rotation)
    assert got.shape == (2, 25, 31)
    assert got.dtype == dtype
    plain = ref.int8_linear(x.to(dtype), *quantized(w))
    want = F.linear(x, w)
    assert relative(got, want) < relative(plain, want) / 2
    assert relative(got, want) < 0.01


# ---- fused activations


@pytest.mark.parametrize("rotation", [None, 16, 256])
@pytest.mark.parametrize("smooth", [None, "channels"])
def test_fused_quantizers_are_their_parts(rotation, smooth):
    x, y = randn(2, 7, 512), randn(2, 7, 512, seed=1)
    weight, scale = randn(512, seed=2), 1 + randn(2, 1, 512, seed=3)
    channels = None if smooth is None else randn(512, seed=4).abs() + 0.5
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight * scale
    for got, values in (
        (ref.rmsnorm_scale_quantize_rows(x, weight, scale, 1e-5, channels, rotation), normed),
        (ref.swiglu_quantize_rows(x, y, channels, rotation), x / (1 + torch.exp(-x)) * y),
    ):
        values = values if channels is None else values / channels
        values = values if rotation is None else rotate(values, rotation)
        values = values.reshape(14, 512)
        q, row_scale = got
        assert torch.allclose(row_scale, values.abs().amax(1) / 127, rtol=1e-5)
        assert ((q * row_scale[:, None] - values).abs() <= row_scale[:, None] * 0.501).all()


@pytest.mark.parametrize("dtype", list(EPS))
def test_gate_residual_rmsnorm(dtype):
    x, y = randn(2, 5, 77, dtype=dtype), randn(2, 5, 77, seed=1, dtype=dtype)
    gate, weight = randn(2, 1, 77, seed=2, dtype=dtype), randn(77, seed=3, dtype=dtype)
    yd = y.double()
    normed = yd / (yd.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    want = x.double() + gate.double() * normed
    got = ref.gate_residual_rmsnorm(x, gate, y, weight, 1e-5)
    assert got.dtype == dtype
    bound = EPS[dtype] * want.abs() + 8 * EPS[torch.float32] * (want.abs() + x.double().abs())
    assert ((got.double() - want).abs() <= bound).all()
