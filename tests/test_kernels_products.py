"""The Triton product and decoding of weights against their formulas; what any kernel refuses.

Run by ``test_kernels.py``, once a device.
"""

from types import SimpleNamespace

import pytest
import torch

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import reference
from ideogram4_quant.ops.blocks import FORMATS, dequantize, quantize
from ideogram4_quant.ops.rotation import largest_group
from ideogram4_quant.tests.kernel_checks import check_quantized, outliers, ulps
from ideogram4_quant.tests.kernel_device import DEVICE, kernel, skip_elsewhere

skip_elsewhere()

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

GEMM_SHAPES = [(1, 24, 128), (16, 33, 192), (17, 130, 256), (130, 131, 384), (257, 9, 128)]
GEMM_SHAPES += [(300, 520, 384)]


@pytest.mark.parametrize(("m", "n", "k"), GEMM_SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_int8_gemm(m, n, k, biased):
    int8_gemm = kernel("int8_gemm")

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
    int8_gemm = kernel("int8_gemm")

    q = torch.full((2, 12288), 127, dtype=torch.int8)
    weight = torch.full((3, 12288), -127, dtype=torch.int8)
    out = int8_gemm(q, torch.ones(2), weight, torch.ones(3), None, torch.float32)
    assert torch.equal(out, torch.full((2, 3), -(127.0**2) * 12288))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_gemm_casts_its_result(dtype):
    int8_gemm = kernel("int8_gemm")

    q = torch.randint(-127, 128, (5, 128), dtype=torch.int8)
    weight = torch.randint(-127, 128, (6, 128), dtype=torch.int8)
    arguments = (q, torch.rand(5) * 1e-3, weight, torch.rand(6) * 1e-3, torch.randn(6).to(dtype))
    out = int8_gemm(*arguments, dtype)
    expected = reference.int8_gemm(*arguments, torch.float32)
    # The interpreter cuts off what the GPU rounds.
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_every_tiling_in_the_tables_gives_the_same_product():
    int8_gemm = kernel("int8_gemm")
    from ideogram4_quant.ops.kernels.configs import GEMM_CONFIGS

    q = torch.randint(-127, 128, (131, 256), dtype=torch.int8)
    weight = torch.randint(-127, 128, (133, 256), dtype=torch.int8)
    arguments = (q, torch.ones(131), weight, torch.ones(133), None, torch.float32)
    expected = reference.int8_gemm(*arguments)
    tables = [group for classes in GEMM_CONFIGS.values() for group in classes.values()]
    for config in {config for group in tables for config in group}:
        assert torch.equal(int8_gemm(*arguments, config=config), expected), config


def test_int8_gemm_takes_slices_of_rows_and_of_weights():
    int8_gemm = kernel("int8_gemm")

    q = torch.randint(-127, 128, (9, 256), dtype=torch.int8)[::2, 128:]
    weight = torch.randint(-127, 128, (20, 256), dtype=torch.int8)[3:16, :128]
    out = int8_gemm(q, torch.ones(5), weight, torch.ones(20)[3:16], None, torch.float32)
    assert torch.equal(out.long(), q.long() @ weight.long().t())


def test_int8_gemm_of_a_depth_that_no_tile_fits_runs_the_formula_and_says_so_once(caplog):
    int8_gemm = kernel("int8_gemm")

    q = torch.randint(-127, 128, (3, 100), dtype=torch.int8)
    weight = torch.randint(-127, 128, (4, 100), dtype=torch.int8)
    for _ in range(2):
        out = int8_gemm(q, torch.ones(3), weight, torch.ones(4), None, torch.float32)
    assert torch.equal(out.long(), q.long() @ weight.long().t())
    assert sum("int8_gemm" in record.message for record in caplog.records) == 1


def test_the_kernels_pass_the_selftest_at_the_shapes_of_real_work():
    from ideogram4_quant.diagnostics import selftest_shapes

    device = torch.device(DEVICE)
    rows = selftest_shapes.row_counts(device) if DEVICE == "cuda" else (16, 200, 257)
    for name, _, allowed, measure in selftest_shapes.checks(device, ["triton"], rows):
        # the interpreter takes a minute for long products, and a second for a format's long rows
        deep = (name.startswith("product") and "x 46" not in name) or name.endswith("K 53248")
        cut_off = " to bf16, " in name  # by the interpreter, where a GPU rounds
        if DEVICE == "cuda" or not (deep or cut_off):
            assert measure() <= allowed, name


# Where the float16 fields of a block lie, in bytes.
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)}
HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
HALVES |= {"Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": ()}


def random_blocks(qtype: str, n: int, k: int) -> torch.Tensor:
    """Blocks with every bit pattern in codes and scales, and finite float16 fields."""
    block = FORMATS[qtype]
    data = torch.randint(0, 256, (n, k // block.block_size, block.type_size), dtype=torch.uint8)
    for at in HALVES[qtype]:
        field = torch.randn(n, k // block.block_size, 1).to(torch.float16)
        data[:, :, at : at + 2] = field.view(torch.uint8)
    if qtype == "MXFP4":
        data[:, :, 0] = torch.randint(118, 134, data.shape[:2])
    return data.reshape(n, -1)


@pytest.mark.parametrize("qtype", HALVES)
@pytest.mark.parametrize(("n", "k", "rotated"), [(3, 256, False), (3, 4608, True), (1, 96, True)])
def test_dequantize_rotate_quantize(qtype, n, k, rotated):
    dequantize_rotate_quantize = kernel("dequantize_rotate_quantize")

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


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "MXFP4"])
def test_dequantize_rotate_quantize_of_rows_beyond_the_registers(qtype):
    dequantize_rotate_quantize = kernel("dequantize_rotate_quantize")

    blocks = random_blocks(qtype, 1, 17408)
    check_quantized(
        dequantize_rotate_quantize(blocks, qtype, (1, 17408), 256),
        reference.dequantize_rotate_quantize(blocks, qtype, (1, 17408), 256),
        reference.rotate(dequantize(blocks, qtype, (1, 17408)).double(), 256),
    )


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16"])
def test_dequantize_rotate_quantize_of_floats(qtype):
    dequantize_rotate_quantize = kernel("dequantize_rotate_quantize")

    blocks = quantize(outliers(4, 512), qtype)
    check_quantized(
        dequantize_rotate_quantize(blocks, qtype, (4, 512), 256),
        reference.dequantize_rotate_quantize(blocks, qtype, (4, 512), 256),
        reference.rotate(dequantize(blocks, qtype, (4, 512)).double(), 256),
    )


@pytest.mark.parametrize("qtype", ["Q4_K", "F16"])
def test_blocks_need_not_lie_at_the_start_of_their_storage(qtype):
    blocks = quantize(torch.randn(6, 512), qtype)[1:]
    expected = kernel("dequantize_rotate_quantize")(blocks.clone(), qtype, (5, 512), 256)
    result = kernel("dequantize_rotate_quantize")(blocks, qtype, (5, 512), 256)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_no_rows_and_no_features_give_empty_results():
    int8_gemm = kernel("int8_gemm")
    quantize_rows = kernel("quantize_rows")

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
        kernel(op)(*arguments(case))


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton does not interpret here")
def test_the_interpreter_makes_the_kernels_available_on_the_cpu():
    from ideogram4_quant.ops.kernels import available

    ready, reason = available("cpu")
    assert ready
    assert "TRITON_INTERPRET" in reason
