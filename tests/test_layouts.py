"""Layouts of comfy-kitchen's QuantizedTensor: the values they hold, and how they are made."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

import ideogram4_quant
from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import blocks, layouts, nf4
from ideogram4_quant.ops.rotation import rotate
from ideogram4_quant.tests.layout_cases import (
    BLOCKS,
    FP8,
    GROUPED,
    INT8,
    KINDS,
    SMOOTH,
    K,
    identical,
    make,
)
from ideogram4_quant.tests.tensors import randn, relative

torch.set_num_threads(1)

# ---- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_true_weight(kind, dtype, mode):
    weight = (randn(37, K) * 0.02).to(dtype)
    qt = make(kind, weight)
    assert qt.dtype == dtype
    assert qt.shape == (37, K)
    got = qt.dequantize()
    assert type(got) is torch.Tensor
    assert got.dtype == dtype
    eps = 0 if dtype == torch.float32 else 2e-3
    assert relative(got, weight) < KINDS[kind][2] + eps


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_row_and_an_outlier_survive(kind):
    weight = randn(9, K) * 0.02
    weight[4] = 0
    weight[7, 100] = 5
    got = make(kind, weight).dequantize()
    assert got.isfinite().all()
    assert not got[4].any() or kind == "nf4 across rows"
    # e2m1 says 4 or 6
    assert abs(got[7, 100] - 5) < (1.1 if kind == "MXFP4" else 0.3)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] not in BLOCKS])
@pytest.mark.parametrize("k", [1, 63, 130])
def test_any_in_features(kind, k):
    layout, options, bound = KINDS[kind]
    if "rotated" in kind:
        k = 64 * (k % 7 or 5)
    if layout in GROUPED:
        with pytest.raises(OpError, match=f"{k}"):
            make(kind, randn(5, k))
        k = GROUPED[layout] * (k % 3 + 1)
    smooth = {name: SMOOTH[:k] for name in ("smooth", "fold_smooth") if name in options}
    options = {**options, **smooth}
    if "rotated" not in kind:
        options.pop("fold_rotation", None)
    if options.get("rotation") == 256:
        options["rotation"] = 16
    weight = randn(5, k)
    qt = QuantizedTensor.from_float(weight, layout, **options)
    assert relative(qt.dequantize(), weight) < 1.5 * bound
    x = randn(3, k, seed=1)
    assert relative(F.linear(x, qt), F.linear(x, weight)) < 2 * bound + 0.02


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("qtype", blocks.PACKED)
def test_gguf_tensors_decode_as_gguf_py_does(qtype):
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    quant = gguf.GGMLQuantizationType[qtype]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    generator = numpy.random.default_rng(0)
    raw = generator.integers(0, 256, (6, K // block * size), dtype=numpy.uint8)
    qt = layouts.gguf_tensor(torch.from_numpy(raw), qtype, (6, K), dtype=torch.float32)
    want = torch.from_numpy(gguf.dequantize(raw, quant))
    assert torch.equal(qt.dequantize().nan_to_num(7), want.nan_to_num(7))


def test_nf4_table_is_the_quantiles_of_the_normal_distribution():
    offset = 0.9677083
    quantile = torch.special.ndtri
    steps = torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]
    below = torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]
    table = torch.cat((quantile(steps), torch.zeros(1), -quantile(below))).sort().values
    table = table / table.abs().max()
    assert torch.allclose(nf4.normal_float().double(), table, atol=1e-6)


def test_nf4_puts_the_first_code_in_the_high_nibble():
    data = torch.tensor([0x0F, 0xF7, 0x80], dtype=torch.uint8)
    absmax = torch.tensor([2.0, 3.0])
    got = nf4.decode(data, absmax, nf4.normal_float(), 5, 4)
    assert torch.equal(got, torch.tensor([-2.0, 2.0, 2.0, 0.0, 3 * nf4.CODE[8]]))


def test_nf4_encodes_every_code_to_itself():
    table = nf4.normal_float()
    values = torch.cat((table * 3, table.flip(0) * 0.5))
    data, absmax = nf4.encode(values, table, 16)
    assert torch.equal(absmax, torch.tensor([3.0, 0.5]))
    assert torch.equal(nf4.decode(data, absmax, table, 32, 16), values)


def test_e4m3_extremes():
    weight = torch.tensor([[448.0, -448.0, 2.0**-9, 0.0], [1.0, float("nan"), 0.5, 3.0]])
    qt = QuantizedTensor.from_float(weight, FP8, scale=torch.ones(()))
    assert torch.equal(qt.dequantize().nan_to_num(7), weight.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 7])
def test_e4m3_overflow(dtype, seed):
    """Of a given scale: clamped, whatever torch's own cast does. Of our own: there is none."""
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[449.0, -500.0, 6e4, inf], [-inf, nan, 448.0, -448.0]], dtype=dtype)
    given = QuantizedTensor.from_float(
        weight, FP8, scale=torch.ones(()), stochastic_rounding=seed
    ).dequantize()
    want = torch.tensor([[448.0, -448.0, 448.0, 448.0], [-448.0, nan, 448.0, -448.0]])
    assert torch.equal(given.float().nan_to_num(7), want.nan_to_num(7))
    finite = weight.nan_to_num(0, posinf=6e4, neginf=-6e4)
    back = QuantizedTensor.from_float(finite, FP8).dequantize()
    assert torch.equal(back.abs().amax(1).float(), finite.abs().amax(1).float())
    # a row that holds an infinity has no scale: all of it says so, its neighbours do not
    poisoned = torch.tensor([[1.0, inf], [1.0, 2.0]], dtype=dtype)
    back = QuantizedTensor.from_float(poisoned, FP8).dequantize()
    assert back[0].isfinite().sum() == 0
    assert torch.equal(back[1].float(), torch.tensor([1.0, 2.0]))


# ---- constructors


def test_int8_tensor_takes_the_scales_that_files_have(mode):
    q = torch.randint(-127, 128, (6, 64), dtype=torch.int8)
    scale = (torch.arange(1, 7) / 8).float()
    want = q.float() * scale[:, None]
    for given in (scale, scale[:, None], scale.bfloat16(), scale.half()[:, None]):
        qt = layouts.int8_tensor(q, given, dtype=torch.float32, validate=True)
        assert torch.equal(qt.dequantize(), want)
        assert qt._params.scale.dtype == torch.float32
    qt = layouts.int8_tensor(q, torch.tensor(0.5), dtype=torch.float32)
    assert torch.equal(qt.dequantize(), q.float() / 2)


def test_int8_tensor_undoes_smoothing_and_rotation():
    weight, smooth = randn(6, 64), SMOOTH[:64]
    turned = rotate(weight * smooth, 16)
    scale = turned.abs().amax(1) / 127
    q = (turned / scale[:, None]).round().to(torch.int8)
    qt = layouts.int8_tensor(q, scale, dtype=torch.float32, smooth=smooth[None], rotation=16)
    assert relative(qt.dequantize(), weight) < 0.01


def test_validation_names_the_row():
    q = torch.ones(4, 8, dtype=torch.int8)
    q[1] = 0
    scale = torch.tensor([1.0, 0.0, 2.0, 3.0])
    qt = layouts.int8_tensor(q, scale, dtype=torch.float32, validate=True)
    assert qt._params.scale.flatten().tolist() == [1.0, 1.0, 2.0, 3.0]
    assert not layouts.int8_tensor(q, scale, dtype=torch.float32).dequantize()[1].any()
    for bad in (0.0, float("nan"), float("inf")):
        scale = torch.tensor([1.0, 0.0, bad, 3.0])
        with pytest.raises(OpError, match="in row 2"):
            layouts.int8_tensor(q, scale, dtype=torch.float32, validate=True)
    smooth = torch.ones(8)
    smooth[5] = 0
    with pytest.raises(OpError, match="in channel 5"):
        layouts.int8_tensor(q, torch.ones(4), dtype=torch.float32, smooth=smooth, validate=True)


Q, S = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
E4M3 = torch.zeros(4, 64).to(torch.float8_e4m3fn)
BYTES = torch.zeros(4, 68, dtype=torch.uint8)
PACKED, ABSMAX = torch.zeros(128, dtype=torch.uint8), torch.ones(4)
BAD = {
    "dtype": lambda: layouts.int8_tensor(Q, S, dtype=torch.int8),
    "q float": lambda: layouts.int8_tensor(Q.float(), S, dtype=torch.float32),
    "q 3-D": lambda: layouts.int8_tensor(Q[None], S, dtype=torch.float32),
    "scale short": lambda: layouts.int8_tensor(Q, S[:3], dtype=torch.float32),
    "scale int": lambda: layouts.int8_tensor(Q, S.int(), dtype=torch.float32),
    "smooth": lambda: layouts.int8_tensor(Q, S, dtype=torch.float32, smooth=S),
    "rotation": lambda: layouts.int8_tensor(Q, S, dtype=torch.float32, rotation=256),
    "rotation 5": lambda: layouts.int8_tensor(Q, S, dtype=torch.float32, rotation=5),
    "device": lambda: layouts.int8_tensor(Q, S.to("meta"), dtype=torch.float32),
    "qtype": lambda: layouts.gguf_tensor(BYTES, "Q9_9", (4, 64), dtype=torch.float32),
    "row bytes": lambda: layouts.gguf_tensor(BYTES, "Q4_0", (4, 64), dtype=torch.float32),
    "block": lambda: layouts.gguf_tensor(BYTES, "Q8_0", (4, 65), dtype=torch.float32),
    "bytes int8": lambda: layouts.gguf_tensor(Q, "Q8_0", (4, 64), dtype=torch.float32),
    "1-D": lambda: layouts.gguf_tensor(BYTES, "Q8_0", (256,), dtype=torch.float32),
    "fp8": lambda: layouts.fp8_tensor(Q, S, dtype=torch.float32),
    "fp8 scale": lambda: layouts.fp8_tensor(E4M3, S[:2], dtype=torch.float32),
    "nf4 bytes": lambda: layouts.nf4_tensor(PACKED[1:], ABSMAX, (4, 64), dtype=torch.float32),
    "nf4 absmax": lambda: layouts.nf4_tensor(PACKED, ABSMAX[1:], (4, 64), dtype=torch.float32),
    "nf4 block": lambda: layouts.nf4_tensor(
        PACKED, ABSMAX, (4, 64), dtype=torch.float32, block_size=0
    ),
    "nf4 code": lambda: layouts.nf4_tensor(
        PACKED, ABSMAX, (4, 64), dtype=torch.float32, code=torch.ones(15)
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_constructors_refuse_what_does_not_fit(case):
    with pytest.raises(OpError, match="found"):
        BAD[case]()


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])])
def test_fp8_tensor_scales(scale):
    data = randn(3, 10).to(torch.float8_e4m3fn)
    qt = layouts.fp8_tensor(data, scale, dtype=torch.bfloat16)
    assert torch.equal(qt.dequantize(), (data.float() * 0.5).bfloat16())
    rows = torch.tensor([1.0, 2.0, 4.0])
    for given in (rows, rows[:, None]):
        qt = layouts.fp8_tensor(data, given, dtype=torch.float32)
        assert torch.equal(qt.dequantize(), data.float() * rows[:, None])


# ---- the package imported twice


def test_the_package_loaded_again_under_another_name_serves_both():
    """As ComfyUI loads a node pack, beside an installed copy."""
    root = Path(ideogram4_quant.__file__).parent
    alias = "ideogram4_quant_by_path"
    spec = importlib.util.spec_from_file_location(
        alias, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    first_class = get_layout_class(INT8)
    ours = make("int8 smooth rotated", randn(12, K))
    packed = make("Q8_0", randn(12, K))
    want, want_packed = F.linear(randn(3, K), ours), F.linear(randn(3, K), packed)
    sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[alias])
        second = importlib.import_module(f"{alias}.ops.layouts")
        second_linear = importlib.import_module(f"{alias}.ops.linear")
        assert get_layout_class(INT8) is second.Int8Layout is not first_class
        theirs = second.int8_tensor(
            ours._qdata,
            ours._params.scale,
            dtype=torch.float32,
            smooth=ours._params.smooth,
            rotation=64,
        )
        for qt in (ours, theirs):
            assert torch.equal(F.linear(randn(3, K), qt), want)
            assert torch.equal(second_linear.linear(randn(3, K), qt), want)
            assert torch.equal(qt[2:5].dequantize(), qt.dequantize()[2:5])
            assert identical(qt.clone().t().t(), theirs)
            again = qt.requantize_from_float(qt.dequantize(), scale="recalculate")
            assert relative(again.dequantize(), qt.dequantize()) < 1e-6
        ours.copy_(theirs)
        assert torch.equal(F.linear(randn(3, K), packed), want_packed)
        assert second_linear._int8_linear_op is ideogram4_quant.ops.linear._int8_linear_op
    finally:
        for name in [n for n in sys.modules if n == alias or n.startswith(alias + ".")]:
            del sys.modules[name]
        for name, layout in layouts.LAYOUTS.items():
            layouts.register_layout_class(name, layout)
