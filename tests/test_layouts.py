"""Layouts of comfy-kitchen's QuantizedTensor: what they hold, and that they stay quantized."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

import ideogram4_quant
from ideogram4_quant.ops import layouts, nf4
from ideogram4_quant.ops.errors import OpError
from ideogram4_quant.ops.rotation import rotate

torch.set_num_threads(1)

INT8, GGUF, FP8, NF4 = (f"Ideogram4Quant{name}" for name in ("Int8", "GGUF", "FP8", "NF4"))
FOLDED_INT8, FOLDED_GGUF = "Ideogram4QuantFoldedInt8", "Ideogram4QuantFoldedGGUF"
K = 512
SMOOTH = torch.rand(K, generator=torch.Generator().manual_seed(9)) + 0.5

# name: layout, its options, largest relative error of a gaussian weight
KINDS = {
    "int8": (INT8, {}, 0.0090),
    "int8 smooth": (INT8, {"smooth": SMOOTH}, 0.0110),
    "int8 rotated": (INT8, {"rotation": 256}, 0.0090),
    "int8 smooth rotated": (INT8, {"smooth": SMOOTH, "rotation": 64}, 0.0110),
    "Q8_0": (GGUF, {"qtype": "Q8_0"}, 0.0060),
    "Q4_K": (GGUF, {"qtype": "Q4_K"}, 0.0800),
    "F16": (GGUF, {"qtype": "F16"}, 0.0005),
    "fp8 row": (FP8, {}, 0.0280),
    "fp8 tensor": (FP8, {"per_row": False}, 0.0280),
    "nf4": (NF4, {}, 0.1000),
    "nf4 across rows": (NF4, {"block_size": 96}, 0.1000),
    "folded int8": (FOLDED_INT8, {"fold_smooth": SMOOTH, "fold_rotation": 64}, 0.0110),
    "folded int8 rotated": (FOLDED_INT8, {"fold_smooth": SMOOTH, "rotation": 256}, 0.0110),
    "folded Q8_0": (FOLDED_GGUF, {"fold_smooth": SMOOTH, "qtype": "Q8_0"}, 0.0080),
}
BLOCKS = (GGUF, FOLDED_GGUF)  # encoded to the least error: whole blocks, no stochastic rounding
SLICEABLE = [name for name in KINDS if name != "nf4 across rows"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, weight, **more):
    layout, options, _ = KINDS[kind]
    return QuantizedTensor.from_float(weight, layout, **options, **more)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def identical(a, b):
    """Same layout, storage and parameters, to the bit."""
    same = a._layout_cls == b._layout_cls and a.dtype == b.dtype and a.shape == b.shape
    names = a._params._tensor_fields()
    return (
        same
        and names == b._params._tensor_fields()
        and torch.equal(a._qdata.view(torch.uint8), b._qdata.view(torch.uint8))
        and all(torch.equal(getattr(a._params, n), getattr(b._params, n)) for n in names)
    )


@pytest.fixture(params=[False, True], ids=["grad mode", "inference mode"])
def mode(request):
    with torch.inference_mode(request.param):
        yield request.param


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
    assert abs(got[7, 100] - 5) < 0.3


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] not in BLOCKS])
@pytest.mark.parametrize("k", [1, 63, 130])
def test_any_in_features(kind, k):
    if "rotated" in kind:
        k = 64 * (k % 7 or 5)
    layout, options, bound = KINDS[kind]
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


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
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


# ---- moving and copying


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_everything(kind, mode):
    qt = make(kind, randn(12, K))
    before = qt.clone()
    for other in (
        qt.clone(),
        qt.detach(),
        qt.contiguous(),
        qt.to("cpu", copy=True),
        qt.to(torch.bfloat16).to(torch.float32),
        qt.to("cpu", torch.bfloat16).to(device="cpu", dtype=torch.float32),
        qt.to("cpu", torch.float32, True),
        qt.to(device="cpu", dtype=torch.float32, copy=True),
        qt.bfloat16().to(torch.zeros(1)),
        qt.bfloat16().float().cpu(),
        torch.nn.Parameter(qt, requires_grad=False),
        qt.t().t(),
    ):
        assert isinstance(other, QuantizedTensor)
        assert identical(other, qt)
    target = torch.empty_like(qt, dtype=torch.bfloat16)
    target.copy_(qt)
    assert target.dtype == torch.bfloat16
    assert torch.equal(target.dequantize(), qt.dequantize().bfloat16())
    target._qdata.view(torch.uint8).fill_(1)
    for name in target._params._tensor_fields():
        getattr(target._params, name).fill_(2)
    assert identical(before, qt)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_move_their_weights(kind, mode):
    """Module.to hands device and dtype to the tensor at once."""
    qt = make(kind, randn(12, K))
    module = torch.nn.Linear(K, 12)
    module.weight = torch.nn.Parameter(qt, requires_grad=False)
    module.to(device="cpu", dtype=torch.bfloat16)
    assert isinstance(module.weight, QuantizedTensor)
    assert module.weight.dtype == torch.bfloat16
    assert identical(module.weight.float(), qt)


@pytest.mark.parametrize("kind", KINDS)
def test_moved_to_another_device(kind, mode):
    qt = make(kind, randn(12, K))
    meta = qt.to("meta", torch.bfloat16)
    assert isinstance(meta, QuantizedTensor)
    assert meta.device.type == "meta"
    assert all(
        getattr(meta._params, name).device.type == "meta" for name in meta._params._tensor_fields()
    )
    assert meta.shape == qt.shape


def test_copy_between_weights_with_and_without_smoothing(mode):
    plain, smooth = make("int8", randn(12, K)), make("int8 smooth rotated", randn(12, K, seed=1))
    plain.copy_(smooth)
    assert identical(plain, smooth)
    smooth.copy_(make("int8", randn(12, K, seed=2)))
    assert smooth._params.smooth is None
    assert smooth._params.rotation is None


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_move_in_both_modes(kind):
    """What the host does: made inside inference mode, moved inside and outside."""
    with torch.inference_mode():
        inside = make(kind, randn(12, K))
        moved = torch.empty_like(inside).copy_(inside)
    assert identical(moved, inside)
    assert identical(inside.clone().to(torch.bfloat16), inside.to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_flatten_and_unflatten(kind):
    qt = make(kind, randn(12, K))
    names, context = qt.__tensor_flatten__()
    inner = {name: getattr(qt, name).clone() for name in names}
    again = QuantizedTensor.__tensor_unflatten__(inner, context, qt.shape, qt.stride())
    assert identical(again, qt)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_has_an_empty_key_and_every_tensor(kind):
    qt = make(kind, randn(12, K))
    tensors = qt.state_dict("layer.weight")
    assert tensors["layer.weight"] is qt._qdata
    assert len(tensors) == 1 + len(qt._params._tensor_fields())
    assert len(qt.layout_cls.get_plain_tensors(qt)) == len(tensors)
    if kind.startswith("int8"):
        assert tensors["layer.weight_scale"].shape == (12, 1)
    module = torch.nn.Linear(K, 12, bias=False)
    module.weight = torch.nn.Parameter(qt, requires_grad=False)
    assert identical(module.state_dict()["weight"], qt)


# ---- row slices and transposes


@pytest.mark.parametrize("kind", SLICEABLE)
def test_row_slices_stay_quantized_and_share_storage(kind, mode):
    qt = make(kind, randn(12, K))
    dense = qt.dequantize()
    for part, want in (
        (qt[3:8], dense[3:8]),
        (qt[-4:], dense[-4:]),
        (qt[:0], dense[:0]),
        (qt[1:11:3], dense[1:11:3]),
        (qt[3:8][1:3], dense[4:6]),
        (qt[3:8, :], dense[3:8]),
        (qt.narrow(0, 2, 5), dense[2:7]),
        (qt.narrow(0, -5, 5), dense[-5:]),
        (qt.t()[:, 3:8], dense[3:8].t()),
    ):
        assert isinstance(part, QuantizedTensor)
        assert part.shape == want.shape
        assert torch.equal(part.dequantize(), want)
        if part.numel():
            inside = part._qdata.data_ptr() - qt._qdata.data_ptr()
            assert 0 <= inside < qt._qdata.nbytes


@pytest.mark.parametrize("kind", SLICEABLE)
def test_a_fused_weight_splits_into_its_layers(kind, mode):
    qt = make(kind, randn(12, K))
    x, dense = randn(3, K), qt.dequantize()
    for parts in (qt.chunk(3), qt.split(4), qt.split([4, 4, 4]), torch.chunk(qt, 3, dim=0)):
        assert len(parts) == 3
        assert all(isinstance(part, QuantizedTensor) for part in parts)
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), dense)
        whole = F.linear(x, qt)
        assert torch.allclose(torch.cat([F.linear(x, part) for part in parts], 1), whole, atol=1e-5)
    assert [part.shape[0] for part in qt.split(5)] == [5, 5, 2]
    assert [part.shape[0] for part in qt.chunk(5)] == [3, 3, 3, 3]


def test_what_cannot_stay_quantized_is_still_right(mode):
    qt = make("nf4 across rows", randn(12, K))
    dense = qt.dequantize()
    for part, want in ((qt[3:8], dense[3:8]), (qt[:, 2:9], dense[:, 2:9]), (qt[5], dense[5])):
        assert type(part) is torch.Tensor
        assert torch.equal(part, want)
    assert isinstance(qt[:], QuantizedTensor)
    with pytest.raises(RuntimeError, match="exceed"):
        qt.narrow(0, 9, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_transposes_are_flags(kind, mode):
    qt = make(kind, randn(12, K))
    for other in (qt.t(), qt.T, qt.transpose(0, 1), qt.transpose(-1, -2), qt.permute(1, 0)):
        assert isinstance(other, QuantizedTensor)
        assert other._params.transposed
        assert other._qdata.data_ptr() == qt._qdata.data_ptr()
        assert torch.equal(other.dequantize(), qt.dequantize().t())
    assert identical(qt.permute(0, 1), qt)


@pytest.mark.parametrize("kind", KINDS)
def test_matmul_with_the_transposed_weight_is_linear(kind, mode):
    qt, x = make(kind, randn(12, K)), randn(5, K)
    want = F.linear(x, qt)
    assert torch.equal(x @ qt.t(), want)
    assert torch.equal(torch.mm(x, qt.T), want)
    assert torch.equal(torch.addmm(torch.ones(12), x, qt.mT), F.linear(x, qt, torch.ones(12)))
    got = torch.addmm(torch.ones(12), x, qt.t(), alpha=2)
    assert torch.allclose(got, 1 + 2 * (x @ qt.dequantize().t()), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_operations_see_the_dense_weight(kind, mode):
    qt = make(kind, randn(12, K))
    dense = qt.dequantize()
    assert torch.equal(qt + 1, dense + 1)
    assert torch.equal(torch.cat((qt, qt)), torch.cat((dense, dense)))
    y = randn(5, 12)
    assert torch.equal(torch.mm(y, qt), torch.mm(y, dense))


# ---- patching, as the host does it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 0, 4123456789])
def test_a_patched_weight_goes_back_into_its_own_layout(kind, seed, mode):
    weight = randn(24, K) * 0.02
    qt = make(kind, weight.to(torch.bfloat16))
    delta = (randn(24, 4, seed=1) @ randn(4, K, seed=2)) * 0.002
    patched = qt.to(torch.float32, copy=True).dequantize() + delta
    kept = patched.clone()
    again = qt.requantize_from_float(
        patched, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
    ).to(qt.dtype)
    assert torch.equal(patched, kept)
    assert again._layout_cls == qt._layout_cls
    assert again.dtype == torch.bfloat16
    assert again._qdata.shape == qt._qdata.shape
    for name in ("rotation", "qtype", "block_size"):
        assert getattr(again._params, name, None) == getattr(qt._params, name, None)
    noise = 1.0 if not seed or KINDS[kind][0] in BLOCKS else 1.6
    assert relative(again.dequantize(), patched) < noise * KINDS[kind][2] + 2e-3
    qt.copy_(again)
    assert identical(qt, again)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("nf4", "nf4 across rows")])
def test_requantizing_unchanged_weights_changes_nothing(kind):
    qt = make(kind, randn(24, K))
    again = qt.requantize_from_float(qt.dequantize(), scale="recalculate", stochastic_rounding=0)
    assert relative(again.dequantize(), qt.dequantize()) < (0.02 if kind == "Q4_K" else 1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] not in BLOCKS])
def test_stochastic_rounding_has_the_right_mean_and_a_seed(kind):
    weight = randn(3, K, seed=5) * 0.02
    one, same, other = (
        make(kind, weight, stochastic_rounding=s).dequantize() for s in (11, 11, 12)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    nearest = make(kind, weight).dequantize()
    draws = [make(kind, weight, stochastic_rounding=s).dequantize() for s in range(1, 65)]
    mean = torch.stack(draws).mean(0)
    assert relative(mean, weight) < relative(nearest, weight) / 2.5


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
