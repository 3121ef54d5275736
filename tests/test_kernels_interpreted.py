"""Triton kernels against their formulas, run by Triton's interpreter on the CPU.

Triton decides at import whether it interprets; ``test_kernels.py`` runs this file in a process of
its own, with TRITON_INTERPRET=1.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from ideogram4_quant.ops import reference
from ideogram4_quant.ops.blocks import FORMATS, dequantize, quantize
from ideogram4_quant.ops.errors import OpError
from ideogram4_quant.ops.rotation import largest_group

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels.py, in a process of its own", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """``torch.empty`` gives NaN and 85, so an output that a kernel leaves unwritten fails."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", poisoned)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in units in the last place; equal NaNs are zero apart."""
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    # Bits of floats of one sign are ordered as the floats are; mirror the negative ones.
    bits = [t.view(torch.int32).long() for t in (a, b)]
    ordered = [torch.where(t < 0, -(t & 0x7FFFFFFF), t) for t in bits]
    return int((ordered[0] - ordered[1]).abs().max()) if a.numel() else 0


def check_quantized(result, expected, values, *, scale_ulps=4):
    """Scales within ulps; int8 equal but for one step where the value lies at a tie.

    ``expected`` is the reference's answer, ``values`` fp64 [M, K] are what was quantized: scales
    are held to those, since a rotation in fp32 leaves the reference itself some ulps off.
    """
    q, scale = result
    assert q.dtype == torch.int8
    assert q.shape == expected[0].shape
    exact = (values.abs().amax(1) / 127).clamp_min(reference.SCALE_FLOOR)
    assert ulps(scale, exact.float()) <= scale_ulps
    off = q != expected[0]
    steps = values / exact[:, None]
    from_tie = (steps - steps.floor() - 0.5).abs()
    assert (q.int() - expected[0].int()).abs().max() <= 1
    assert not off.any() or from_tie[off].max() <= 1e-4


def outliers(m: int, k: int, dtype=torch.float32) -> torch.Tensor:
    """Normal values, a few channels 30 times as large, a zero row if there are rows to spare."""
    x = torch.randn(m, k)
    x[:, :: max(k // 3, 1)] *= 30
    if m > 2:
        x[1] = 0
    return x.to(dtype)


WIDTHS = [(4608, 256), (12288, 256), (768, 256), (320, 64), (272, 16), (100, 4), (1000, None)]
WIDTHS += [(7, None), (1, None), (17408, 256)]


@pytest.mark.parametrize(("k", "rotation"), WIDTHS)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_smooth_rotate_quantize_rows(k, rotation, smoothed):
    from ideogram4_quant.ops.kernels import smooth_rotate_quantize_rows

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
    from ideogram4_quant.ops.kernels import quantize_rows

    x = outliers(m, 4608, dtype)
    check_quantized(quantize_rows(x), reference.quantize_rows(x), x.double(), scale_ulps=0)


def test_ties_round_to_even():
    from ideogram4_quant.ops.kernels import quantize_rows

    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 125.5]])
    q, scale = quantize_rows(x)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]


def test_zero_rows_quantize_to_zero_with_the_floor_scale():
    from ideogram4_quant.ops.kernels import smooth_rotate_quantize_rows

    q, scale = smooth_rotate_quantize_rows(torch.zeros(2, 512), None, 256)
    assert not q.any()
    assert torch.equal(scale, torch.full((2,), reference.SCALE_FLOOR))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("rotation", [None, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_poisons_itself_alone(poison, rotation):
    from ideogram4_quant.ops.kernels import int8_gemm, smooth_rotate_quantize_rows

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
    from ideogram4_quant.ops.kernels import swiglu_quantize_rows

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
    from ideogram4_quant.ops.kernels import rmsnorm_scale_quantize_rows

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
    from ideogram4_quant.ops.kernels import gate_residual_rmsnorm

    x, y = torch.randn(2, 3, k), torch.randn(2, 3, k)
    weight, gate = torch.rand(k) + 0.5, modulations((2, 3), k)[which]
    out = gate_residual_rmsnorm(x, gate, y, weight, 1e-6)
    expected = reference.gate_residual_rmsnorm(x, gate, y, weight, 1e-6)
    # The sum may cancel: one ulp of the larger operand is what any order of rounding can reach.
    bound = 4 * torch.finfo(torch.float32).eps * (x.abs() + (expected - x).abs())
    assert ((out - expected).abs() <= bound).all()


def test_norms_of_rows_beyond_the_registers_run_the_formula_and_say_so_once(caplog):
    from ideogram4_quant.ops.kernels import rmsnorm_scale_quantize_rows

    x, weight = torch.randn(1, 20480), torch.ones(20480)
    for _ in range(2):
        result = rmsnorm_scale_quantize_rows(x, weight, weight, 1e-6)
    expected = reference.rmsnorm_scale_quantize_rows(x, weight, weight, 1e-6)
    assert torch.equal(result[0], expected[0])
    assert sum("20480" in record.message for record in caplog.records) == 1


def test_inputs_need_not_be_contiguous():
    from ideogram4_quant.ops.kernels import gate_residual_rmsnorm, swiglu_quantize_rows

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


GEMM_SHAPES = [(1, 24, 128), (16, 33, 192), (17, 130, 256), (130, 131, 384), (257, 9, 128)]
GEMM_SHAPES += [(300, 520, 384)]


@pytest.mark.parametrize(("m", "n", "k"), GEMM_SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_int8_gemm(m, n, k, biased):
    from ideogram4_quant.ops.kernels import int8_gemm

    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    ones_m, ones_n = torch.ones(m), torch.ones(n)
    # With unit scales fp32 shows the int32 sums: they stay below 2^24.
    product = int8_gemm(q, ones_m, weight, ones_n, None, torch.float32)
    assert torch.equal(product.long(), q.long() @ weight.long().t())
    scale_x, scale_w = torch.rand(m) * 0.02, torch.rand(n, 1) * 0.02
    bias = torch.randn(n) if biased else None
    out = int8_gemm(q, scale_x, weight, scale_w, bias, torch.float32)
    expected = reference.int8_gemm(q, scale_x, weight, scale_w, bias, torch.float32)
    assert ulps(out, expected) <= 2


def test_int8_gemm_holds_the_largest_sum():
    from ideogram4_quant.ops.kernels import int8_gemm

    q = torch.full((2, 12288), 127, dtype=torch.int8)
    weight = torch.full((3, 12288), -127, dtype=torch.int8)
    out = int8_gemm(q, torch.ones(2), weight, torch.ones(3), None, torch.float32)
    assert torch.equal(out, torch.full((2, 3), -(127.0**2) * 12288))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_gemm_casts_its_result(dtype):
    from ideogram4_quant.ops.kernels import int8_gemm

    q = torch.randint(-127, 128, (5, 128), dtype=torch.int8)
    weight = torch.randint(-127, 128, (6, 128), dtype=torch.int8)
    arguments = (q, torch.rand(5) * 1e-3, weight, torch.rand(6) * 1e-3, torch.randn(6).to(dtype))
    out = int8_gemm(*arguments, dtype)
    expected = reference.int8_gemm(*arguments, torch.float32)
    # The interpreter cuts off what the GPU rounds.
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_every_tiling_in_the_tables_gives_the_same_product():
    from ideogram4_quant.ops.kernels import int8_gemm
    from ideogram4_quant.ops.kernels.configs import GEMM_CONFIGS

    q = torch.randint(-127, 128, (131, 256), dtype=torch.int8)
    weight = torch.randint(-127, 128, (133, 256), dtype=torch.int8)
    arguments = (q, torch.ones(131), weight, torch.ones(133), None, torch.float32)
    expected = reference.int8_gemm(*arguments)
    tables = [group for classes in GEMM_CONFIGS.values() for group in classes.values()]
    for config in {config for group in tables for config in group}:
        assert torch.equal(int8_gemm(*arguments, config=config), expected), config


def test_int8_gemm_takes_slices_of_rows_and_of_weights():
    from ideogram4_quant.ops.kernels import int8_gemm

    q = torch.randint(-127, 128, (9, 256), dtype=torch.int8)[::2, 128:]
    weight = torch.randint(-127, 128, (20, 256), dtype=torch.int8)[3:16, :128]
    out = int8_gemm(q, torch.ones(5), weight, torch.ones(20)[3:16], None, torch.float32)
    assert torch.equal(out.long(), q.long() @ weight.long().t())


def test_int8_gemm_of_a_depth_that_no_tile_fits_runs_the_formula_and_says_so_once(caplog):
    from ideogram4_quant.ops.kernels import int8_gemm

    q = torch.randint(-127, 128, (3, 100), dtype=torch.int8)
    weight = torch.randint(-127, 128, (4, 100), dtype=torch.int8)
    for _ in range(2):
        out = int8_gemm(q, torch.ones(3), weight, torch.ones(4), None, torch.float32)
    assert torch.equal(out.long(), q.long() @ weight.long().t())
    assert sum("int8_gemm" in record.message for record in caplog.records) == 1


# Where the float16 fields of a block lie, in bytes.
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)}
HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(qtype: str, n: int, k: int) -> torch.Tensor:
    """Blocks with every bit pattern in codes and scales, and finite float16 fields."""
    block = FORMATS[qtype]
    data = torch.randint(0, 256, (n, k // block.block_size, block.type_size), dtype=torch.uint8)
    for at in HALVES[qtype]:
        field = torch.randn(n, k // block.block_size, 1).to(torch.float16)
        data[:, :, at : at + 2] = field.view(torch.uint8)
    return data.reshape(n, -1)


@pytest.mark.parametrize("qtype", HALVES)
@pytest.mark.parametrize(("n", "k", "rotated"), [(3, 256, False), (3, 4608, True), (1, 96, True)])
def test_dequantize_rotate_quantize(qtype, n, k, rotated):
    from ideogram4_quant.ops.kernels import dequantize_rotate_quantize

    gguf = pytest.importorskip("gguf")
    k = k if k % FORMATS[qtype].block_size == 0 else 768
    rotation = largest_group(k) if rotated else None
    blocks = random_blocks(qtype, n, k)
    kind = gguf.GGMLQuantizationType(FORMATS[qtype].ggml_type)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)).double()
    check_quantized(
        dequantize_rotate_quantize(blocks, qtype, (n, k), rotation),
        reference.dequantize_rotate_quantize(blocks, qtype, (n, k), rotation),
        reference.rotate(weight, rotation) if rotation else weight,
    )


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K"])
def test_dequantize_rotate_quantize_of_rows_beyond_the_registers(qtype):
    from ideogram4_quant.ops.kernels import dequantize_rotate_quantize

    blocks = random_blocks(qtype, 1, 17408)
    check_quantized(
        dequantize_rotate_quantize(blocks, qtype, (1, 17408), 256),
        reference.dequantize_rotate_quantize(blocks, qtype, (1, 17408), 256),
        reference.rotate(dequantize(blocks, qtype, (1, 17408)).double(), 256),
    )


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16"])
def test_dequantize_rotate_quantize_of_floats(qtype):
    from ideogram4_quant.ops.kernels import dequantize_rotate_quantize

    blocks = quantize(outliers(4, 512), qtype)
    check_quantized(
        dequantize_rotate_quantize(blocks, qtype, (4, 512), 256),
        reference.dequantize_rotate_quantize(blocks, qtype, (4, 512), 256),
        reference.rotate(dequantize(blocks, qtype, (4, 512)).double(), 256),
    )


@pytest.mark.parametrize("qtype", ["Q4_K", "F16"])
def test_decoded_weights_go_where_they_are_told(qtype):
    from ideogram4_quant.ops.kernels import dequantize_rotate_quantize

    blocks = quantize(torch.randn(6, 512), qtype)[1:]  # not at the start of its storage
    expected = dequantize_rotate_quantize(blocks, qtype, (5, 512), 256)
    workspace = torch.full((40, 512), 55, dtype=torch.int8), torch.full((40,), float("nan"))
    out = (workspace[0][:5], workspace[1][:5])
    result = dequantize_rotate_quantize(blocks, qtype, (5, 512), 256, out=out)
    assert result[0].data_ptr() == workspace[0].data_ptr()
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    assert (workspace[0][5:] == 55).all()
    with pytest.raises(OpError, match=r"out q.*needed contiguous torch.int8 \(5, 512\)"):
        dequantize_rotate_quantize(blocks, qtype, (5, 512), 256, out=workspace)


def test_no_rows_and_no_features_give_empty_results():
    from ideogram4_quant.ops.kernels import int8_gemm, quantize_rows

    q, scale = quantize_rows(torch.zeros(0, 256))
    assert q.shape == (0, 256)
    assert scale.shape == (0,)
    weight = torch.zeros(4, 256, dtype=torch.int8)
    assert int8_gemm(q, scale, weight, torch.ones(4), None, torch.bfloat16).shape == (0, 4)


REFUSED = [
    ("int8_gemm", lambda c: (c.x, c.ones, c.w, c.five, None, c.out), "float32 and torch.int8"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w[:, :64], c.five, None, c.out), r"\(5, 64\)"),
    ("int8_gemm", lambda c: (c.q, c.five, c.w, c.five, None, c.out), r"scale_x.*needed \[3\]"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w, c.ones, None, c.out), r"weight_scale.*needed \[5\]"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w, c.five.double(), None, c.out), "float64"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w, c.five, c.ones, c.out), r"bias.*needed \[5\]"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w_columns, c.five, None, c.out), "contiguous"),
    ("int8_gemm", lambda c: (c.q, c.ones, c.w.to("meta"), c.five, None, c.out), "devices"),
    ("quantize_rows", lambda c: (c.x.double(),), "float64"),
    ("quantize_rows", lambda c: (c.x[:, :0],), "without values"),
    ("smooth_rotate_quantize_rows", lambda c: (c.x, c.five), r"smooth.*needed \[128\]"),
    ("smooth_rotate_quantize_rows", lambda c: (c.x, None, 256), "multiple of 256"),
    ("smooth_rotate_quantize_rows", lambda c: (c.x, None, 32), "unknown rotation group"),
    ("swiglu_quantize_rows", lambda c: (c.x, c.x[:2]), "differ in shape"),
    ("swiglu_quantize_rows", lambda c: (c.x, c.x.to("meta")), "devices"),
    ("rmsnorm_scale_quantize_rows", lambda c: (c.x, c.x[0], c.x[:2], 1e-6), "broadcast"),
    ("gate_residual_rmsnorm", lambda c: (c.x, c.x, c.x, c.five, 1e-6), r"weight.*needed \[128\]"),
    ("dequantize_rotate_quantize", lambda c: (c.bytes, "Q8_0", (2, 64)), "2 rows of 68 bytes"),
    ("dequantize_rotate_quantize", lambda c: (c.bytes, "Q8_0", (2, 48)), "multiple of 32"),
    ("dequantize_rotate_quantize", lambda c: (c.bytes, "Q8_0", (2, 96), 64), "multiple of 64"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_values(op, arguments, message):
    from ideogram4_quant.ops import kernels

    weight = torch.zeros(5, 128, dtype=torch.int8)
    case = SimpleNamespace(
        x=torch.randn(3, 128),
        q=torch.zeros(3, 128, dtype=torch.int8),
        w=weight,
        w_columns=weight.t().contiguous().t(),
        ones=torch.ones(3),
        five=torch.ones(5),
        out=torch.float32,
        bytes=torch.zeros(100, dtype=torch.uint8),
    )
    with pytest.raises(OpError, match=message):
        getattr(kernels, op)(*arguments(case))


def test_the_interpreter_makes_the_kernels_available_on_the_cpu():
    from ideogram4_quant.ops.kernels import available

    ready, reason = available("cpu")
    assert ready
    assert "TRITON_INTERPRET" in reason
