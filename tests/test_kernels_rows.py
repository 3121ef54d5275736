"""The Triton kernels of rows against their formulas: quantization, SwiGLU, norms.

Run by ``test_kernels.py``, once a device.
"""

import pytest
import torch

from ideogram4_quant.ops import reference
from ideogram4_quant.tests.kernel_checks import check_quantized, outliers
from ideogram4_quant.tests.kernel_device import kernel, skip_elsewhere

skip_elsewhere()

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

WIDTHS = [(4608, 256), (12288, 256), (768, 256), (320, 64), (272, 16), (100, 4), (1000, None)]
WIDTHS += [(7, None), (1, None), (17408, 256), (3072, 1024), (12288, 4096)]


@pytest.mark.parametrize(("k", "rotation"), WIDTHS)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_smooth_rotate_quantize_rows(k, rotation, smoothed):
    smooth_rotate_quantize_rows = kernel("smooth_rotate_quantize_rows")

    x = outliers(3, k)
    smooth = torch.rand(k) + 0.5 if smoothed else None
    values = x.double() / smooth.double() if smoothed else x.double()
    if rotation:
        values = reference.rotate(values, rotation)
    check_quantized(
        smooth_rotate_quantize_rows(x, smooth, rotation),
        reference.smooth_rotate_quantize_rows(x, smooth, rotation),
        values,
    )


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rows_is_exact(m, dtype):
    quantize_rows = kernel("quantize_rows")

    x = outliers(m, 4608, dtype)
    check_quantized(quantize_rows(x), reference.quantize_rows(x), x.double(), scale_ulps=0)


def test_ties_round_to_even():
    quantize_rows = kernel("quantize_rows")

    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 125.5]])
    q, scale = quantize_rows(x)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]


def test_zero_rows_quantize_to_zero_with_the_floor_scale():
    smooth_rotate_quantize_rows = kernel("smooth_rotate_quantize_rows")

    q, scale = smooth_rotate_quantize_rows(torch.zeros(2, 512), None, 256)
    assert not q.any()
    assert torch.equal(scale, torch.full((2,), reference.SCALE_FLOOR))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("rotation", [None, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_poisons_itself_alone(poison, rotation):
    int8_gemm = kernel("int8_gemm")
    smooth_rotate_quantize_rows = kernel("smooth_rotate_quantize_rows")

    x = torch.randn(4, 4608)
    clean = smooth_rotate_quantize_rows(x, None, rotation)
    x[2, 4500] = poison
    q, scale = smooth_rotate_quantize_rows(x, None, rotation)
    assert scale.isnan().tolist() == [False, False, True, False]
    assert not q[2].any()
    rest = torch.tensor([0, 1, 3])
    assert torch.equal(q[rest], clean[0][rest])
    assert torch.equal(scale[rest], clean[1][rest])
    weight = torch.randint(-127, 128, (9, 4608), dtype=torch.int8)
    out = int8_gemm(q, scale, weight, torch.rand(9), None, torch.float32)
    assert out.isnan().all(1).tolist() == [False, False, True, False]
    assert out[rest].isfinite().all()


@pytest.mark.parametrize(("k", "rotation"), [(12288, 256), (768, None), (576, 64), (35, None)])
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_swiglu_quantize_rows(k, rotation, smoothed):
    swiglu_quantize_rows = kernel("swiglu_quantize_rows")

    gate, up = outliers(3, k) * 0.3, torch.randn(3, k)
    smooth = torch.rand(k) + 0.5 if smoothed else None
    values = torch.nn.functional.silu(gate.double()) * up.double()
    values = values / smooth.double() if smoothed else values
    values = reference.rotate(values, rotation) if rotation else values
    check_quantized(
        swiglu_quantize_rows(gate, up, smooth, rotation),
        reference.swiglu_quantize_rows(gate, up, smooth, rotation),
        values,
    )


def modulations(lead: tuple[int, ...], k: int) -> list[torch.Tensor]:
    """Every way a modulation broadcasts to ``[*lead, k]``: whole, per batch, one, one number."""
    shapes = [(*lead, k), (lead[0], *[1] * (len(lead) - 1), k), (k,), (), (*lead, 1), (lead[-1], k)]
    return [torch.rand(shape) + 0.5 for shape in shapes]


@pytest.mark.parametrize(("k", "rotation"), [(4608, 256), (768, None), (1000, 4)])
@pytest.mark.parametrize("which", range(6))
def test_rmsnorm_scale_quantize_rows(k, rotation, which):
    rmsnorm_scale_quantize_rows = kernel("rmsnorm_scale_quantize_rows")

    x = outliers(6, k).reshape(2, 3, k)
    weight = torch.rand(k) + 0.5
    scale = modulations((2, 3), k)[which]
    smooth = torch.rand(k) + 0.5 if which % 2 else None
    normed = torch.nn.functional.rms_norm(x.double(), (k,), weight.double(), 1e-6)
    values = normed * scale.double() / (smooth.double() if which % 2 else 1.0)
    values = reference.rotate(values, rotation) if rotation else values
    check_quantized(
        rmsnorm_scale_quantize_rows(x, weight, scale, 1e-6, smooth, rotation),
        reference.rmsnorm_scale_quantize_rows(x, weight, scale, 1e-6, smooth, rotation),
        values.reshape(6, k),
    )


@pytest.mark.parametrize("k", [4608, 100])
@pytest.mark.parametrize("which", range(6))
def test_gate_residual_rmsnorm(k, which):
    gate_residual_rmsnorm = kernel("gate_residual_rmsnorm")

    x, y = torch.randn(2, 3, k), torch.randn(2, 3, k)
    weight, gate = torch.rand(k) + 0.5, modulations((2, 3), k)[which]
    out = gate_residual_rmsnorm(x, gate, y, weight, 1e-6)
    expected = reference.gate_residual_rmsnorm(x, gate, y, weight, 1e-6)
    # The sum may cancel: one ulp of the larger operand is what any order of rounding can reach.
    bound = 4 * torch.finfo(torch.float32).eps * (x.abs() + (expected - x).abs())
    assert ((out - expected).abs() <= bound).all()


def test_norms_of_rows_beyond_the_registers_run_the_formula_and_say_so_once(caplog):
    rmsnorm_scale_quantize_rows = kernel("rmsnorm_scale_quantize_rows")

    x, weight = torch.randn(1, 20480), torch.ones(20480)
    for _ in range(2):
        result = rmsnorm_scale_quantize_rows(x, weight, weight, 1e-6)
    expected = reference.rmsnorm_scale_quantize_rows(x, weight, weight, 1e-6)
    assert torch.equal(result[0], expected[0])
    assert sum("20480" in record.message for record in caplog.records) == 1


def test_inputs_need_not_be_contiguous():
    gate_residual_rmsnorm = kernel("gate_residual_rmsnorm")
    swiglu_quantize_rows = kernel("swiglu_quantize_rows")

    fused = torch.randn(5, 2 * 768)
    gate, up = fused[:, :768], fused[:, 768:]
    result = swiglu_quantize_rows(gate, up, None, 256)
    expected = swiglu_quantize_rows(gate.contiguous(), up.contiguous(), None, 256)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    x, weight = torch.randn(768, 5).t(), torch.rand(1536)[::2]
    out = gate_residual_rmsnorm(x, x, x, weight, 1e-6)
    copy = x.contiguous()
    assert torch.equal(out, gate_residual_rmsnorm(copy, copy, copy, weight.contiguous(), 1e-6))


# ---- bf16: every kernel casts before it computes. Triton's interpreter (3.7.1, 3.9.0) computes it
# ---- on bit patterns, so that one product or sum of bf16 values gives other results here.

HALVES = {
    "smooth_rotate_quantize_rows": lambda k, x, u, w, s: (x, w, 256),
    "swiglu_quantize_rows": lambda k, x, u, w, s: (x, u, w, 256),
    "rmsnorm_scale_quantize_rows": lambda k, x, u, w, s: (x, w, s, 1e-6, w, 256),
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_those_numbers_in_fp32(name, dtype):
    k = 768
    x, up = outliers(3, k, dtype), torch.randn(3, k).to(dtype)
    weight, scale = (torch.rand(k) + 0.5).to(dtype), (torch.rand(3, k) + 0.5).to(dtype)
    run = kernel(name)
    narrow = run(*HALVES[name](k, x, up, weight, scale))
    wide = run(*HALVES[name](k, x.float(), up.float(), weight.float(), scale.float()))
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_in_a_narrow_dtype_is_the_wide_one_rounded(dtype):
    k = 768
    x, gate, y = (torch.randn(2, 3, k).to(dtype) for _ in range(3))
    weight = (torch.rand(k) + 0.5).to(dtype)
    run = kernel("gate_residual_rmsnorm")
    narrow = run(x, gate, y, weight, 1e-6)
    wide = run(x.float(), gate.float(), y.float(), weight.float(), 1e-6)
    assert narrow.dtype == dtype
    # the interpreter cuts off what the GPU rounds
    torch.testing.assert_close(narrow.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)
